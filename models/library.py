"""diffusers, or an error that says how to install it."""

try:
    import diffusers as diffusers
except ModuleNotFoundError as error:
    from ..extras import missing

    raise missing(error) or error from error
