# Trimtab's verbs. `make demo` and `make test` need Python 3.11+, make and a package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One CPU build of torch, installed first and alone, so that no later package pulls a CUDA build. On a GPU machine: make TORCH=torch demo
TORCH ?= torch==2.13.0
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-quick test test-slow check docs clean

demo: $(VENV)/.demo  ## train the tour's arms and write runs/tour/report.html
	$(BIN)/trimtab run recipes/tour.yaml --workers 2

demo-quick: $(VENV)/.demo  ## the same in about two minutes
	$(BIN)/trimtab run recipes/tour.yaml --set scale=quick --out runs/tour-quick --workers 2

test: $(VENV)/.dev  ## run the tests, files side by side
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## lint, format, types, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.dev  ## write the generated pages
	$(BIN)/python docs/generate.py

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("Trimtab needs Python 3.11 or newer; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev,smollm2]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs
