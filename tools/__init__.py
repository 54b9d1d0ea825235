"""What runs on top of the package: the command line, the study of strategies, sweeps over all models, the demo.

cli.py       the `fxpass` command; commands/ has one file per subcommand
study/       quality of stale strategies against bytes: `fxpass study`
sweeps/      all models in one table: zoo (docs/coverage.md), balance (docs/balance.md), traffic (docs/traffic.md)
demo/        `make demo`, and how its two pipelines were trained
console.py   what commands share; printer.py: graphs and numbers as text; pictures.py: comparing two images
checkout.py  files that only a clone has
"""
