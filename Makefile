# Two commands do everything on a machine that has Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
# Options for pip, for example an index with the CPU build of torch:
#   make demo PIP_ARGS="--extra-index-url URL"
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       create the environment and compare five objectives end to end (about 15 minutes on two cores)"
	@echo "make test       create the environment, check types, layers and style, and run the tests"
	@echo "make test-slow  the long tests (whole demo, kills, browser)"
	@echo "make clean      remove the environment"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rlprior needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/rlprior demo --out $(OUT)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright

test: check
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV)
