# Everything runs in .venv, which `make` builds on first use; PYTHON picks the interpreter that it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Taken where the virtual environment has no torch yet; the CPU build of torch brings no triton.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
# Processes that the tests run in.
JOBS ?= 2
DEMO ?= runs/demo
ZOO ?= runs/zoo
# Of gpu-check: the file that it writes, by default named after the GPU and the day, and after how many seconds it starts
# nothing more.
RESULTS ?=
BUDGET ?= 500
FAMILIES := $(addsuffix -digits,DiT DSMoE DiffMoE TC-DiT EC-DiT JiT JiTMoE)

.PHONY: help build demo zoo test test-all test-emulated lint bench gpu-check clean
.DEFAULT_GOAL := test

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1: /p' Makefile

$(VENV)/.installed: pyproject.toml setup.py Makefile CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TRITON)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

build: $(VENV)/.installed  ## the environment, and the CUDA extension where nvcc is on the PATH
	$(BIN)/python -c "import diffmoe_kernels; print(*map(': '.join, diffmoe_kernels.available_backends().items()), sep='\n')"

demo: $(VENV)/.installed  ## train DSMoE and a dense DiT on the digits, sample, score
	$(BIN)/python -m models.demo --output $(DEMO) --overwrite

zoo: $(VENV)/.installed  ## train every family on the digits for a minute, sample, score
	$(BIN)/python -m models.demo --output $(ZOO) --overwrite --minutes 1 --minutes-each --learning-rate 3e-3 --ema-decay 0.99 --models $(FAMILIES)

test: $(VENV)/.installed  ## all tests but those that need a GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=20

test-all: $(VENV)/.installed  ## the tests, and the reference vectors of a full set in GOLDEN_DIR
	test -d "$(GOLDEN_DIR)" || { echo "test-all: set GOLDEN_DIR to the folder of a full set of reference vectors"; exit 2; }
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	GOLDEN_DIR="$(abspath $(GOLDEN_DIR))" $(BIN)/python -m pytest tests/golden

test-emulated: $(VENV)/.installed  ## the tests of the ops on what Triton and nvcc compile for sm_90, emulated
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --emulate 90 tests/ops

lint: $(VENV)/.installed  ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/kernels/*.h

bench: $(VENV)/.installed  ## times of ops, layers and models on this machine, as tables
	$(BIN)/python -m pytest benchmarks -q

# Takes what $(PYTHON) has, torch, triton, pytest and pytest-benchmark among it, and installs nothing.
gpu-check:  ## the tests that need a CUDA device, then the benchmarks, then what they reach of the goals
	$(PYTHON) -m benchmarks.check $(if $(RESULTS),"$(RESULTS)") --budget=$(BUDGET)

clean:  ## all but the runs of your own
	rm -rf $(VENV) $(DEMO) $(ZOO) build dist *.egg-info diffmoe_kernels/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
