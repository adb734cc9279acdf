# Everyday commands. The virtual environment is made on first use and renewed when setup.cfg changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev,vision]'
	@touch $@

setup: $(STAMP)  ## make .venv and install the package with its development tools

demo: $(STAMP)  ## run the demo: six ways to fine-tune on a generated corpus, table and chart (minutes, no network, no GPU)
	$(BIN)/darel demo --output-dir demo_output/$$(date +%Y%m%d-%H%M%S)

# A process a core with one thread each: the models of tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
test: $(STAMP)  ## run the fast tests
	$(PYTEST) -m 'not slow'

test-all: $(STAMP)  ## run all tests, kills and two-process launches included
	$(PYTEST)

lint: $(STAMP)  ## check style, and that each wing stands on those below it
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache

format: $(STAMP)  ## fix style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# QUICK=--quick shows that all of them run; TEXTS, MODEL, REVIEWS, IMAGES are folders of your own (E2E files, base model, SST-2, parquet).
ON_TEXTS := $(QUICK) $(if $(TEXTS),--data_dir $(TEXTS)) $(if $(MODEL),--model_name_or_path $(MODEL))
bench: $(STAMP)  ## run the benchmarks (hours); QUICK=--quick: minutes, no claim rests on it
	for name in overhead savings planner scores quality; do \
		$(BIN)/python eval/benchmarks/$$name.py $(ON_TEXTS) || exit 1; done
	for name in steps scale metrics faults hypercomplex; do $(BIN)/python eval/benchmarks/$$name.py $(QUICK) || exit 1; done
	$(BIN)/python eval/benchmarks/beyond.py $(QUICK) $(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(REVIEWS),--data_dir $(REVIEWS))
	$(if $(QUICK)$(IMAGES),$(BIN)/python eval/benchmarks/vision.py $(QUICK) $(if $(IMAGES),--data_dir $(IMAGES)))

clean:  ## remove build products (the environment stays)
	rm -rf build dist *.egg-info demo_output
