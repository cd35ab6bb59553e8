PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Bytecode is kept even where the environment says otherwise: without it each of the processes that
# tests start would compile all of PyTorch anew, which takes longer than all that they do.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test types pytest docs format clean

demo: $(VENV)/.installed
	$(BIN)/hvpspec demo --out out

# Types are checked beside the tests: without its cache, mypy keeps one core busy for a minute.
test: $(VENV)/.developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(MAKE) --jobs 2 types pytest

types:
	$(BIN)/mypy

pytest:
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

docs: $(VENV)/.developer
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

format: $(VENV)/.developer
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.developer: pyproject.toml | $(BIN)/python
	# Compiling all of PyTorch and its like takes longer than compiling what is imported.
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[test,peers,networks]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) out docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
