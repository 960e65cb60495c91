# make test      the tests            make lint     ruff and mypy
# make table4    the main benchmark   make mutate   each named defect must turn the tests red
# make layer     one layer beside its rivals (7 minutes)
# make gpu       on a machine with a GPU: does everything work there, and how fast (9 minutes, the system's own torch)
# Options of the benchmark: make table4 ARGS="--device cuda --dtype bf16"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt pyproject.toml setup.py
STAMP := $(VENV)/.installed-$(firstword $(shell cat $(PINS) | cksum))
# Without an NVIDIA GPU the CPU build of the same torch will do; from PyPI a Linux machine gets gigabytes of CUDA.
TORCH_SOURCE ?= $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)

# The profiler that measures peak memory would print two lines a step.
export KINETO_LOG_LEVEL := 99

.PHONY: test table4 layer gpu mutate lint clean

test: $(STAMP)
	$(BIN)/python -m pytest -n auto $(ARGS)

table4: $(STAMP)
	$(BIN)/python -m benchmarks.table4 $(ARGS)

layer: $(STAMP)
	$(BIN)/python -m benchmarks.layer $(ARGS)

# Not from .venv: the torch of a GPU machine is the one to be tested, and there may be no network to install another.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

mutate: $(STAMP)
	$(BIN)/python -m tests.mutate $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first, so that the package is built against the torch that will run it.
$(STAMP): $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps $(TORCH_SOURCE) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[bench,test,lint]"
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
