# `make demo` and `make test` set up what they need; the second time that costs a second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint bench gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel torch
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

demo: setup
	$(BIN)/safer-fast finetune quickstart --compare

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# A measurement a file, with its date and device; python -m benchmarks.report puts them into the README.
RESULT = benchmarks/results/$(shell date +%F)

bench: setup
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.bench_step --json $(RESULT)-step-deit-ti-32-$(DEVICE).json
	$(BIN)/python -m benchmarks.bench_ops --json $(RESULT)-kernels-$(DEVICE).json
	$(BIN)/python -m benchmarks.bench_data --json $(RESULT)-data-$(DEVICE).json

DEVICE = $(shell $(BIN)/python -c "from benchmarks.gpu import slug; print(slug())")

# By the machine's own Python, from the checkout: nothing is installed. GPU='--only ops --budget 500' passes options on.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
