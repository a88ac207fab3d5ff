# make demo | test | test-all | lint | types | docs | lock | clean
PYTHON ?= python3
VENV   ?= .venv
# Another build of torch: make demo TORCH='torch==2.13.0 --index-url <the index of the build you want>'
TORCH  ?= torch

BIN  := $(VENV)/bin
DONE := $(VENV)/.installed
PIP  := $(BIN)/python -m pip install -qq --no-compile --constraint infra/constraints.txt

.PHONY: demo test test-all lint types docs lock clean install
demo: $(DONE)
	$(BIN)/mmdistill run --recipe digits

# Two streams of files. They end together, because tests/conftest.py begins with the longest files.
STREAMS := -n 2 --dist loadfile --no-loadscope-reorder

test: $(DONE)
	$(BIN)/python -m pytest $(STREAMS) -m "not slow and not gpu and not services"

test-all: test
	$(BIN)/python -m pytest $(STREAMS) -m "slow and not gpu and not services"

install: $(DONE)
$(DONE): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing what mmdistill needs into $(VENV): about 2 GB, some minutes ..."
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev]'
# Modules are compiled by all cores, where pip uses one. Some templates among them are no valid Python.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $(DONE)

lint: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DONE)
	$(BIN)/mypy

docs: $(DONE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Needs uv. The CUDA libraries are left out: they follow from torch's build.
lock:
	uv pip compile --universal --python-version 3.10 --all-extras --no-header --no-annotate --no-emit-index-url \
	    --no-emit-find-links --quiet --output-file infra/.lock pyproject.toml
	{ sed -n '/^#/p' infra/constraints.txt; grep -vE '^(nvidia-|cuda-|triton|torch==)' infra/.lock; echo 'torch==2.13.0'; } > infra/.new
	mv infra/.new infra/constraints.txt && rm infra/.lock

clean:
	rm -rf $(VENV) .mmdistill .site
