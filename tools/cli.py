"""The `fxpass` command, also `python -m fxpass.tools.cli` (under torchrun). The subcommands are in `commands/`."""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    """Run the command line; without its libraries, say how to install them and exit with 2."""
    from .. import logs

    if not logs.known():  # the import of the package has said so
        sys.exit(2)
    try:
        from .commands.app import app
        from .console import warning_text
    except ModuleNotFoundError as error:
        from ..extras import missing

        if (hint := missing(error)) is None:
            raise
        print(f"error: {hint}", file=sys.stderr)
        sys.exit(2)
    warnings.formatwarning = warning_text
    app()


if __name__ == "__main__":
    main()
