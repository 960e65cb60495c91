# make test      the tests, 5 minutes on 2 cores                make lint     ruff and mypy
# make test TORCH=newest, TORCH=oldest    with the newest torch, Triton and NumPy, and with the oldest torch that installs
# make test-slow what they cover in another way, 5 more         make test-all both, one after the other
# make table4    the main benchmark                             make mutate   each named defect must turn the tests red
# make layer     one layer beside its rivals (7 minutes)
# make sanitize  the CUDA kernels on the host, under GCC's sanitizers
# make gpu       on a machine with a GPU: does everything work there, and how fast (8 minutes, the system's own torch)
# Options of the benchmark: make table4 ARGS="--device cuda --dtype bf16"

PYTHON ?= python3
TORCH ?= pinned
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PINS := $(CONSTRAINTS) pyproject.toml setup.py
STAMP := $(VENV)/.installed-$(firstword $(shell cat $(PINS) | cksum))
# Without an NVIDIA GPU the CPU build of the same torch will do; from PyPI a Linux machine gets gigabytes of CUDA.
TORCH_SOURCE ?= $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
# A change of csrc rebuilds the compiled part alone; where there is no compiler, the record says so.
NATIVE := hydra_kernels/_native.json
CSRC := $(wildcard $(foreach kind,cpp h cu cuh,csrc/*.$(kind) csrc/*/*.$(kind)))
# CUDA kernels for the cards that are here; without one they are only compiled, once.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | grep -x '[0-9.]*'),9.0)

# The profiler that measures peak memory would print two lines a step.
export KINETO_LOG_LEVEL := 99

.PHONY: test test-slow test-all table4 layer gpu mutate sanitize lint clean

ifeq ($(TORCH),pinned)
# Tests of one xdist_group share a process. Slow ones are marked so and left out by pyproject.toml.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadgroup --durations 10 --durations-min 0.5

test: $(NATIVE)
	$(PYTEST) $(ARGS)

test-slow: $(NATIVE)
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow
else
# Another torch has an environment and a copy of the sources of its own, with its own compiled part in it: so none is
# ever built over, or loaded by, the torch of another. What it installs stays; remove .venv-newest for a newer torch.
COPY := build/$(TORCH)
CHANGES_newest := /^(torch|triton|numpy)==/d
CHANGES_oldest := s/^torch==.*/torch==2.11.0/; s/^setuptools==.*/setuptools==81.0.0/

test test-slow test-all:
	$(if $(CHANGES_$(TORCH)),,$(error TORCH is $(TORCH): expected newest or oldest))
	mkdir -p $(COPY)/build
	find $(COPY) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z --cached --others --exclude-standard | tar -c --ignore-failed-read --null -T - | tar -x -C $(COPY)
	sed -E '$(CHANGES_$(TORCH))' constraints.txt > $(COPY)/build/constraints.txt
	touch -r constraints.txt $(COPY)/build/constraints.txt  # as old as its source, or all would be installed again
	$(MAKE) -C $(COPY) $@ TORCH=pinned VENV=../../.venv-$(TORCH) CONSTRAINTS=build/constraints.txt
endif

table4: $(NATIVE)
	$(BIN)/python -m benchmarks.table4 $(ARGS)

layer: $(NATIVE)
	$(BIN)/python -m benchmarks.layer $(ARGS)

# Not from .venv: the torch of a GPU machine is the one to be tested, and there may be no network to install another.
# It builds csrc itself, within its time.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

mutate: $(NATIVE)
	$(BIN)/python -m tests.mutate $(ARGS)

sanitize: $(STAMP)
	$(BIN)/python -m tests.sanitize $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first: the package is built against the torch that will run it, by a rule of its own.
$(STAMP): $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps $(TORCH_SOURCE) -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch setuptools ninja
	HYDRA_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation -c $(CONSTRAINTS) -e ".[bench,examples,minilm,peft,quantised,test,lint]"
	rm -f $(VENV)/.installed-*
	touch $@

$(NATIVE): $(CSRC) $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build out *.egg-info hydra_kernels/_native.*
