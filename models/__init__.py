"""Everything that knows models by name.

catalog/     published models at full size, without weights: what `fxpass plan sdxl` plans
small.py     tiny random models of the same kinds, for tests and first steps: `small:NAME`
zoo/         a tiny model of every denoiser, ControlNet and autoencoder class of diffusers (case.py: what a case is)
inputs/      example inputs for a module, derived from its config
resolve.py   what the command line accepts as MODEL
pipelines.py which parts of diffusers pipelines are split, and how pipelines announce a generation
wrappers.py  the two halves of an autoencoder as modules
demo/, demo_dit/   two trained demo pipelines (only in a clone: their weights are not in the wheel)
"""
