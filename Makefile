PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench

demo: .venv/installed
	$(BIN)/python -m triton_tied check
	$(BIN)/python examples/denoise.py

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python bench/cpu.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,examples]"
	touch $@
