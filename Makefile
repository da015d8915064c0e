# `make demo` and `make test` work on a fresh machine with Python 3.11+, make and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# A visible NVIDIA driver picks the CUDA build of JAX: 13 for drivers from 580 on, 12 for older ones.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
CUDA := $(if $(DRIVER),$(shell [ $(DRIVER) -ge 580 ] && echo cuda13 || echo cuda12))
comma := ,
EXTRAS = $(if $(CUDA),$(1)$(if $(1),$(comma))$(CUDA),$(1))

.PHONY: help demo test test-gpu lint types check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparsejax needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "Installing sparsejax$(if $(CUDA), with $(CUDA)) into $(VENV) ..."
	$(PIP) install -e '.$(if $(call EXTRAS,),[$(call EXTRAS,)])'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sparsejax with its test tools$(if $(CUDA), and $(CUDA)) into $(VENV) ..."
	$(PIP) install -c constraints.txt -e '.[$(call EXTRAS,dev)]'
	@touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime  ## answer long prompts with the embedded model
	$(BIN)/sparsejax demo

test: $(VENV)/.dev  ## run the test suite (CPU)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test-gpu: $(VENV)/.dev  ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -q -m gpu

lint: $(VENV)/.dev  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test  ## everything that CI runs

format: $(VENV)/.dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
