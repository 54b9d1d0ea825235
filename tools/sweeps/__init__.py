"""Sweeps over many models, one table each; run one as `python -m fxpass.tools.sweeps.NAME`."""
