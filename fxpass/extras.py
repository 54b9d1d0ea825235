"""Optional dependencies: which extra installs what, and an error that names the command to run."""

from __future__ import annotations

#: modules that some part of the package imports, and the extra of pyproject.toml that installs each
EXTRA_OF = {
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "accelerate": "diffusers",
    "typer": "cli",
    "rich": "cli",
    "PIL": "cli",
    "networkx": "inspect",
    "jinja2": "report",
    "altair": "report",
    "vl_convert": "report",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "skimage": "study",
    "scipy": "study",
    "matplotlib": "study",
}


class MissingExtraError(ModuleNotFoundError):
    """An optional dependency is not installed; the message names it and the command that installs it."""

    def __init__(self, module: str) -> None:
        super().__init__(f'{module} is not installed; run: pip install "fxpass[{EXTRA_OF[module]}]"', name=module)


def missing(error: ModuleNotFoundError) -> MissingExtraError | None:
    """The error to raise instead of `error`, or None if what is missing belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    return MissingExtraError(module) if module in EXTRA_OF else None
