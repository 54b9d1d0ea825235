# make demo   a picture from a prompt: on one device, and on two
# make test   everything that a change must keep green (minutes on two cores)
# The first target that needs it builds .venv; only Python 3.11+ has to be there.

PYTHON ?= python3
PY     := .venv/bin/python
TORCH  ?= torch==2.13.0

# PyPI's torch for Linux brings gigabytes of CUDA libraries. Without an NVIDIA driver take PyTorch's CPU builds instead, unless
# the environment says where wheels come from. Another CUDA version: make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130
ifeq ($(PIP_FIND_LINKS)$(PIP_INDEX_URL)$(PIP_EXTRA_INDEX_URL)$(shell command -v nvidia-smi),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

MINUTES ?= 30
JOBS    ?= 2
N       ?= 100

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz mutants study-tests slow zoo pipelines balance bench bench-displaced bench-parts bench-startup bench-link gpu gpu-tests lint format train-demo clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

.venv: .venv/.stamp
.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fxpass needs Python 3.11 or later: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PY) -m pip install --quiet -e ".[dev]"
	@touch $@

# kept apart: with torchao there, diffusers has something to say at every import
.venv/.quantised: .venv/.stamp
	$(PY) -m pip install --quiet -e ".[quantised]"
	@touch $@

.venv/.pipelines: .venv/.stamp
	$(PY) -m pip install --quiet -e ".[pipelines]"
	@touch $@

demo: .venv/.stamp  ## a picture from a prompt, on one device and on two
	$(PY) -m fxpass.tools.demo

test: .venv/.quantised  ## the tests of the compiler and the runtime, in two processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

fuzz: .venv/.quantised  ## new random examples for every property of tests/passes: make fuzz MINUTES=30 JOBS=2
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --minutes $(MINUTES) --jobs $(JOBS) $(if $(SEED),--seed $(SEED))

mutants: .venv/.quantised  ## change one place of the compiler at a time; a test must fail: make mutants N=100 SEED=0
	OMP_NUM_THREADS=1 $(PY) -m tests.mutants -n $(N) $(if $(SEED),--seed $(SEED))

study-tests: .venv/.stamp  ## the tests of `fxpass study` and its reports
	OMP_NUM_THREADS=1 $(PY) -m pytest -m study

slow: .venv/.quantised  ## the slow tests: whole models, many ranks
	$(PY) -m pytest -m slow --timeout=1800

zoo: .venv/.stamp  ## sweep every denoiser, ControlNet and autoencoder class: docs/coverage.md (half an hour)
	$(PY) -m fxpass.tools.sweeps.zoo

pipelines: .venv/.pipelines  ## sweep every pipeline class, unsplit against split: docs/pipelines.md (an hour)
	$(PY) -m fxpass.tools.sweeps.pipelines

balance: .venv/.stamp  ## how evenly 8 ranks share the work of every published model: docs/balance.md
	$(PY) -m fxpass.tools.sweeps.balance --ranks 8 --write

bench: .venv/.stamp  ## speed and traffic against the unsplit model
	$(PY) -m benchmarks.run

bench-displaced: .venv/.stamp  ## displaced steps against steps that exchange nothing
	$(PY) -m benchmarks.displaced

bench-parts: .venv/.stamp  ## guidance groups and decodes against the same programs without exchanges
	$(PY) -m benchmarks.parts

bench-startup: .venv/.stamp  ## seconds and memory until worker processes have 1 GB of weights
	$(PY) -m benchmarks.startup

bench-link: .venv/.stamp  ## the share of their speed that steps keep over a slow link (needs root, ip and tc)
	$(PY) -m benchmarks.link

# the sizes in turn, at most about five minutes each; an interrupted run goes on where it was
gpu: .venv/.stamp  ## one rank's steps on a CUDA device, for sdxl and flux-dev: out/gpu
	$(PY) -m benchmarks.gpu --models flux-dev
	$(PY) -m benchmarks.gpu --models sdxl --whole eager torch.compile channels_last
	$(PY) -m benchmarks.gpu --models sdxl --size 2048 --whole eager torch.compile channels_last
	$(PY) -m benchmarks.gpu --models sdxl --size 3840 --whole eager
	$(PY) -m benchmarks.gpu --models sdxl flux-dev --ranks 1 2 8 --links nvlink pcie --ways eager graph inductor+graph
	$(PY) -m benchmarks.gpu --models sdxl --ranks 8 --cfg 2 --links nvlink pcie --ways eager graph inductor+graph

gpu-tests: .venv/.stamp  ## the tests that need a CUDA device
	$(PY) -m pytest tests/cuda tests/benchmarks/test_gpu.py

lint: .venv/.stamp  ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: .venv/.stamp  ## format, and mend what ruff can mend
	$(PY) -m ruff check --fix --quiet . || true
	$(PY) -m ruff format .

train-demo: .venv/.stamp  ## train the demo pipeline anew
	$(PY) -m fxpass.tools.demo.train_unet

clean:  ## remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
