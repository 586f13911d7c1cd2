PYTHON ?= python3
BIN := .venv/bin
# What runs again in Triton's interpreter: the kernels as they are launched, and the way to them.
LAUNCHES := $(filter-out tests/kernels/test_path.py,$(wildcard tests/kernels/test_*.py))
WAY := tests/kernels/test_path.py tests/test_functional.py tests/test_modules.py tests/test_cached.py

.PHONY: demo test test_here test_launches test_way lint docs bench figures gpu inspect

demo: .venv/installed
	$(BIN)/python -m triton_tied check
	$(BIN)/python examples/denoise.py

# Two processes of one thread each, the longest first: most tests are small.
test: .venv/installed
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 test_launches test_way test_here

test_here: .venv/installed
	$(BIN)/python -m pytest -q

test_launches: .venv/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(LAUNCHES)

test_way: .venv/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(WAY)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/: read site/index.html. A link or a name that is not there fails.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The CPU's result: what is in float32 and does not take it seconds.
bench: .venv/installed
	$(BIN)/python -m triton_tied bench --device cpu --budget 840 \
		--json bench/results/cpu-$$(date +%F).json

# The README's figures and tables, from the newest results.
figures: .venv/installed
	$(BIN)/python bench/figures.py

# Tests, tuning and benchmarks of a GPU, into the folder OUT. A machine with a GPU has its PyTorch.
OUT ?= gpu-results
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu.py $(OUT)

inspect: .venv/installed
	$(BIN)/python -m triton_tied inspect --write

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,bench,docs,examples]"
	touch $@
