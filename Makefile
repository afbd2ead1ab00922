# Two commands set everything up: `make demo` and `make test`.
# PYTHON may name any Python 3.10-3.13; constraints.txt pins torch so that its CPU build is taken where one is offered.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint types clean

demo: $(VENV)/.installed
	$(BIN)/qwenkit chat smollm2 "Explain in one sentence why the sky is blue." --temperature 0 --max-tokens 80

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile
	QWENKIT_OPS=avx2 $(BIN)/python -m pytest -n 2 --dist loadfile tests/model tests/engine
	QWENKIT_OPS=avx512 $(BIN)/python -m pytest -n 2 --dist loadfile tests/model tests/engine tests/test_smollm2.py

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test-installed
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(wildcard src/qwenkit/ops/cpu/*.cpp src/qwenkit/ops/cpu/*.h)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
