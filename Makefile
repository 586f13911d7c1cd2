PYTHON ?= python3
BIN := .venv/bin
# What runs again through the kernels, in Triton's interpreter.
INTERPRETED := tests/kernels tests/test_functional.py tests/test_modules.py tests/test_cached.py

.PHONY: demo test lint bench inspect

demo: .venv/installed
	$(BIN)/python -m triton_tied check
	$(BIN)/python examples/denoise.py

test: .venv/installed
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python bench/cpu.py

inspect: .venv/installed
	$(BIN)/python -m triton_tied inspect --write

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,examples]"
	touch $@
