PYTHON ?= python3
BIN := .venv/bin
# What runs again through the kernels, in Triton's interpreter.
INTERPRETED := tests/kernels tests/test_functional.py tests/test_modules.py tests/test_cached.py

.PHONY: demo test test_here test_interpreted lint bench inspect

demo: .venv/installed
	$(BIN)/python -m triton_tied check
	$(BIN)/python examples/denoise.py

# Two processes of one thread each: most tests are small.
test: .venv/installed
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 test_here test_interpreted

test_here: .venv/installed
	$(BIN)/python -m pytest -q

test_interpreted: .venv/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(INTERPRETED)

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
