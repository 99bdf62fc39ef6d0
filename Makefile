# `make help` lists the targets. `make demo` and `make test` set up their own environment in .venv.
# Empty: the first suitable of python3, python3.13, python3.12 and python3.11, which scripts/find_python.sh looks for.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
TEXT ?=
MATRIX ?=

.DEFAULT_GOAL := help
.PHONY: help install matrix test test-slow test-all lint types golden demo bench-cpu bench-training chaos sm90 sanitize bench-kernels tune gpu-check multi-gpu-check kvpress-env clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-zA-Z0-9_-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Every target looks at the environment first: in a second where it is complete.
install:  ## Make the environment .venv with everything the tests need
	@sh scripts/install.sh "$(PYTHON)" --venv $(VENV)

# Two test processes of one thread each: threads that wait for one another in turn are slower than one thread.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# More for pytest: make test-slow ARGS=--collect-only lists the slow tests.
ARGS ?=

test: install lint sm90  ## Lint, types, compiled kernels and all tests but the slow ones
	$(PYTEST) $(PYTEST_ARGS) -m 'not slow' $(ARGS)

test-slow: install  ## The slow tests
	$(PYTEST) $(PYTEST_ARGS) -m 'slow' $(ARGS)

test-all: test test-slow  ## All checks and tests

lint: install types  ## ruff (rules and format), mypy, and the layers between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=kernels $(BIN)/lint-imports --no-cache

types: install  ## mypy
	$(BIN)/mypy

# Some cases alone: make golden GOLDEN='--cases dense sep'
GOLDEN ?=

golden: install  ## Compare losses, checkpoints, exports and more with b31b21f, bit by bit (minutes on two cores)
	@$(BIN)/python -m tests.golden $(GOLDEN)

matrix: install  ## The fast tests in the oldest, shipped and newest versions; results to docs/versions.md (MATRIX='--only newest')
	$(BIN)/python scripts/matrix.py --record $(MATRIX)

chaos: install  ## Kill a two-rank run 50 times at random, resume it, compare it bitwise (CHAOS_ARGS='--kills 200 --seed 7')
	$(BIN)/python scripts/chaos.py $(CHAOS_ARGS)

demo: install  ## Train a dense and a separator model on the sample corpus (minutes on two cores) and compare them
	$(BIN)/python scripts/demo.py

bench-cpu: install  ## CPU benchmarks, each beside its baseline: attention, plan, tokenisation
	$(BIN)/python -m benchmarks.attention.cpu
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.tokenization $(TEXT)

# On a GPU more: make bench-training BENCH='--model pythia160m --lengths 2048 8192'
BENCH ?=

bench-training: install  ## Training steps with dense and separator attention in interleaved rounds; figures to runs/bench_training.json
	mkdir -p runs
	$(BIN)/python -m benchmarks.training --output runs/bench_training.json $(BENCH)

sm90: install  ## Compile every shipped kernel for sm_90 and sm_80 without a GPU and check it; count touched pairs
	$(BIN)/python -m benchmarks.attention.compile_gate

sanitize: install  ## Run the GPU tests of the kernels under compute-sanitizer: no access out of bounds
	@command -v compute-sanitizer >/dev/null \
		|| { echo "error: compute-sanitizer is not on the PATH: install it, it comes with the CUDA toolkit"; exit 2; }
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "error: there is no GPU here: the sanitizer has nothing to watch"; exit 2; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
		$(BIN)/python -m pytest tests/attention/test_triton_gpu.py -k "random_shapes or plain_attention or float32"

bench-kernels: install  ## Time the kernels beside their baselines on this GPU and draw the results
	$(BIN)/python -m benchmarks.attention.gpu
	$(BIN)/python -m benchmarks.attention.draw

tune: install  ## Time tile configurations on this GPU and rewrite the shipped table
	$(BIN)/python -m benchmarks.attention.tune

gpu-check: install  ## Correctness, kernel table and training throughput on this GPU in three stages of 8 minutes
	$(BIN)/python scripts/gpu_check.py --output gpu_check

# make multi-gpu-check MULTI_GPU='--stages layouts kill --gpus 4 --budget-minutes 8'
MULTI_GPU ?=

multi-gpu-check: install  ## Layouts, resume, kill, overlap, scaling and throughput on 2 or more GPUs in 20 minutes; results to multi_gpu_check/results.json
	$(BIN)/python -m benchmarks.multi_gpu --output multi_gpu_check $(MULTI_GPU)

KVPRESS := .venv-kvpress
EQUAL_MEMORY := benchmarks/equal_memory

kvpress-env:  ## Make the environment of KVPress, .venv-kvpress, for benchmarks/equal_memory
	@python=$$(sh scripts/find_python.sh "$(PYTHON)" 11) && $$python -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet -r $(EQUAL_MEMORY)/requirements.txt
	@echo "Done. Next: $(KVPRESS)/bin/python $(EQUAL_MEMORY)/presses.py --help"

clean:  ## Remove the environment, caches and build products (runs stay)
	rm -rf $(VENV) $(KVPRESS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
