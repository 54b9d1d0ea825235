"""The category of all warnings of this package."""


class FxpassWarning(UserWarning):
    """A call works, but slower or less exact than it may seem; the message says why, and what to do."""
