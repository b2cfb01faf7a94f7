# Everything starts here: `make demo` and `make test` set up what they need by themselves.

PYTHON ?= python3
# Index for torch alone. Empty: pip's own index, on Linux the CUDA build. Without a GPU:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Where `make demo` writes its data, run and predictions.
DEMO_OUT ?= autoseg-demo
# Further arguments for pytest, e.g. make test PYTEST_ARGS="-k geometry"
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
BACKEND := $(shell sed -n -E '/^(hatchling|editables)==/p' constraints.txt)

# One thread for each test worker: two workers that each start a thread per core get in each other's way.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-all format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with everything pinned

# torch goes first and alone, so that its index does not serve anything else. The second step then finds the pinned
# version installed, whichever build it is, keeps it, and adds its dependencies.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autoseg needs Python 3.11 or newer; name one: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV); torch is a large download, so this takes a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -qq --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install -qq --constraint constraints.txt $(BACKEND)
	$(PIP) install -qq --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(STAMP)  ## plan, train, predict and report on the packaged data
	$(BIN)/autoseg demo $(DEMO_OUT)

check: $(STAMP)  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)  ## the tests that need no data folder and little time
	$(PYTEST) -m "not slow and not data" $(PYTEST_ARGS)

test-all: export AUTOSEG_TEST_DATA ?= ../shared/data
test-all: $(STAMP)  ## every test, those on the real data in AUTOSEG_TEST_DATA too
	$(PYTEST) $(PYTEST_ARGS)

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches, builds and the demo's output
	rm -rf $(VENV) autoseg-demo dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
