# Each target does its own set-up in .venv; nothing has to be installed before.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-slow test-gpu test-multigpu scaling test-matrix lint format docs package bench coverage clean
help:
	@echo "make demo      a trained video model, dense, sparse and distilled (3 to 7 minutes on 2 cores)"
	@echo "make test      the test suite (CPU and Triton's interpreter)"
	@echo "make test-slow the tests that take longer"
	@echo "make test-gpu  the GPU tests, with the python on the PATH (PYTHON=...)"
	@echo "make test-multigpu  what runs in several processes, over NCCL where there are as many GPUs (PYTHON=...)"
	@echo "make scaling   all that wants several GPUs: their tests, scaling, unequal heads, losses (PYTHON=...)"
	@echo "make test-matrix  the test suite on the oldest and the newest versions that are supported, into docs/compatibility.md"
	@echo "make lint      ruff, format check, mypy"
	@echo "make docs      the pages as a site, into build/site"
	@echo "make package   the source distribution and the wheel, tried in an empty environment"
	@echo "make bench     attention benchmark on this machine's device"
	@echo "make coverage  what is found in real models, into docs/coverage.md (about 10 minutes)"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,test,lint,docs,package]"
	touch $@

demo: .venv/ready
	$(BIN)/python studies/moving_digits/demo.py

# One thread for each worker: small parallel operations of several workers would wait for each other.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not gpu and not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

test-gpu:
	$(PYTHON) -m pytest -m gpu

test-multigpu:
	$(PYTHON) -m pytest -m multigpu

scaling:
	PYTHON=$(PYTHON) sh benchmarks/scaling_on_gpus.sh

# The versions of constraints-oldest.txt and constraints-newest.txt, and of constraints.txt for what those do not name.
.venv-%/ready: pyproject.toml constraints.txt constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	sed -n 's/^\([a-z0-9-]*\)[=<].*/^\1[=<]/p' constraints-$*.txt > .venv-$*/named
	grep -v -f .venv-$*/named constraints.txt | cat constraints-$*.txt - > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --editable ".[demo,test]"
	touch $@

.PRECIOUS: .venv-%/ready
test-on-%: .venv-%/ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n auto --maxprocesses 8 -m "not gpu and not slow" --junitxml=.venv-$*/suite.xml; \
	status=$$?; .venv-$*/bin/python benchmarks/compatibility.py .venv-$*/suite.xml; exit $$status

test-matrix: test-on-oldest test-on-newest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

package: .venv/ready
	PYTHON=$(PYTHON) .ci/package

bench: .venv/ready
	$(BIN)/python benchmarks/attention.py

coverage: .venv/ready
	$(BIN)/python benchmarks/coverage.py --markdown docs/coverage.md

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
