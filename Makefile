# Everything happens in the virtual environment .venv, which `make install` makes here, once.
#   make demo        compresses the bundled model and prints what came of it
#   make test        the tests                  make check    style, types, layering
#   make smollm2     the same for SmolLM2-135M, a real pretrained model
#   make minilm      the same for all-MiniLM-L6-v2, an encoder of sentences
#   make bench-NAME  runs tests/benchmarks/NAME.py
# Another interpreter: make install PYTHON=python3.12. Another package index: PIP_INDEX_URL=... make

PYTHON ?= python3
# Pinned here alone: the package itself works with a range of versions.
TORCH := torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed
TYPES := build/types/moesaic
FOLDERS := kernels methods search orchestrator
SMOLLM2 := build/smollm2/model.safetensors
MINILM := build/minilm/model.safetensors

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check lint types layering smollm2 minilm clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("make install PYTHON=...: needs Python 3.11 or newer, \
	this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet '$(TORCH)' --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/moesaic run recipes/demo.yaml --output runs/demo

# Two processes of one thread each; a file stays in one, which makes its fixtures once. Dozens of
# processes import the package: its byte code is kept, whatever the shell says.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint types layering

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers know packages by their folders, so they get a folder named as the package is.
types: $(STAMP)
	@mkdir -p $(TYPES)
	@ln -sfn $(addprefix $(CURDIR)/,$(FOLDERS)) $(TYPES)/
	MYPYPATH=build/types $(BIN)/mypy -p moesaic

layering: $(STAMP)
	$(BIN)/python -m pytest tests/test_layering.py

$(SMOLLM2): | $(STAMP)
	$(BIN)/python -m moesaic.orchestrator.smollm2 --output $(@D)

smollm2: $(STAMP) $(SMOLLM2)
	$(BIN)/moesaic run recipes/smollm2.yaml --output runs/smollm2

$(MINILM): | $(STAMP)
	$(BIN)/python -m moesaic.orchestrator.minilm --output $(@D)

minilm: $(STAMP) $(MINILM)
	$(BIN)/moesaic run recipes/minilm.yaml --output runs/minilm

bench-%: tests/benchmarks/%.py $(STAMP)
	$(BIN)/python $<

# Results (runs/) and the environment (.venv) stay.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(FOLDERS) tests -name __pycache__ -type d -exec rm -rf {} +
