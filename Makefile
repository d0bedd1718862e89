# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
ARGS ?=

.PHONY: demo test check format lint types setup clean

demo: $(VENV)/.model
	$(BIN)/keelweight demo --out $(OUT) --force $(ARGS)

test: $(VENV)/.model
	$(BIN)/python -m pytest

check: $(VENV)/.model
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(VENV)/.installed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

setup: $(VENV)/.model

# The virtual environment, with the versions of constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The built-in model, fetched and converted once into the user's cache.
$(VENV)/.model: $(VENV)/.installed
	$(BIN)/python -m keelweight.inputs.builtin
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
