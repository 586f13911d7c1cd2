PYTHON ?= python3
BIN := .venv/bin
# What runs again in Triton's interpreter: the kernels as they are launched, and the way to them.
LAUNCHES := $(filter-out tests/kernels/test_path.py,$(wildcard tests/kernels/test_*.py))
WAY := tests/kernels/test_path.py tests/test_functional.py tests/test_modules.py \
	tests/test_cached_weights.py tests/test_prepare.py tests/test_strides.py \
	tests/test_like_dense_layer.py tests/test_export.py

# What is compiled for GPUs that need not be there, and what a CPU executes of it.
COMPILED := tests/executed tests/inspection tests/ptx_machine

.PHONY: help demo test test_here test_compiled test_launches test_way lint docs bench figures gpu \
	inspect execute

help:  ## list the targets
	@sed -n 's/^\([a-z_]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 16

TORCHRUN := $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node
demo: .venv/installed  ## check this machine against float64, then run the examples
	$(BIN)/python -m triton_tied check
	$(BIN)/python examples/denoise.py
	$(BIN)/python examples/stable_resnet.py
	$(BIN)/python examples/lipschitz.py --steps 60
	folder=$$(mktemp -d) && \
	$(TORCHRUN)=2 examples/train_ddp.py --steps 40 --checkpoint $$folder && \
	$(TORCHRUN)=1 examples/train_ddp.py --steps 60 --checkpoint $$folder

# Two processes of one thread each, the longest first: most tests are small.
test: .venv/installed  ## all tests, in two processes
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 test_compiled test_here test_way test_launches

test_here: .venv/installed  ## tests of what runs on this machine
	$(BIN)/python -m pytest -q $(COMPILED:%=--ignore=%)

test_compiled: .venv/installed  ## tests of the kernels as they are compiled for GPUs
	$(BIN)/python -m pytest -q $(COMPILED)

test_launches: .venv/installed  ## tests of the kernels, in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(LAUNCHES)

test_way: .venv/installed  ## tests of functions and layers, through the interpreted kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(WAY)

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/: read site/index.html. A link or a name that is not there fails.
docs: .venv/installed  ## build the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The CPU's result: what is in float32 and does not take it seconds.
bench: .venv/installed  ## measure the CPU against the peers, in a quarter of an hour
	$(BIN)/python -m triton_tied bench --device cpu --budget 840 \
		--json bench/results/cpu-$$(date +%F).json

figures: .venv/installed  ## draw the tables and pictures of docs/
	$(BIN)/python bench/figures.py
	$(BIN)/python docs/draw_kernels.py

# A machine with a GPU has its PyTorch.
OUT ?= gpu-results
gpu:  ## tests, tuning and benchmarks of a GPU, into the folder OUT
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu.py $(OUT)

inspect: .venv/installed  ## compile and execute all proposed configs, and commit the good ones
	$(BIN)/python -m triton_tied.inspection.regenerate_candidates
	PYTHONPATH=tests $(BIN)/python -m executed.committed

EACH ?= 2
execute: .venv/installed  ## run the PTX of drawn cases on the CPU: EACH of every list, SEED=n repeats
	PYTHONPATH=tests $(BIN)/python -m executed --each $(EACH) $(if $(SEED),--seed $(SEED))

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,bench,docs,examples]"
	touch $@
