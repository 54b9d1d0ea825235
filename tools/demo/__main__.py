"""`python -m fxpass.tools.demo`."""

from .command import app

app()
