# Both targets set everything up in .venv: they need Python 3.11 or newer, make and a package index.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock

.PHONY: demo test lint types benchmark clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: lint types
	SCIPY_ARRAY_API=1 $(BIN)/python -m pytest tests/test_estimator_checks.py -k array_api
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup  # a process a core: more threads would wait

lint: .venv/.test
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: .venv/.test
	$(BIN)/mypy

benchmark: .venv/.test .venv/.peer
	$(BIN)/python benchmarks/gated.py --pyscnn .venv/peer/bin/python

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml requirements.lock | .venv/bin/python
	$(PIP) -e '.[plot]'
	touch $@

.venv/.test: pyproject.toml requirements.lock | .venv/bin/python
	$(PIP) -e '.[test]'
	touch $@

# pyscnn asks for packages that it does not use, gigabytes of them: only what it imports, in a place of its own
.venv/.peer: benchmarks/requirements.txt | .venv/bin/python
	$(PYTHON) -m venv .venv/peer
	.venv/peer/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

clean:
	rm -rf .venv demo build dist
