# Two commands for newcomers: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
# Processes that share the tests.
WORKERS ?= 2
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# Each worker begins with half of the tests in order, so that a module's shared runs are made once;
# a worker that is done takes tests from the end of the other's.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
DEFAULT := -m "not slow and not gpu and not real_data"

.PHONY: setup demo test test-more test-slurm test-slurm-core coverage lint clean

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch .venv/installed

demo: setup
	$(BIN)/anomaly-train output_dir=outputs/demo

test: setup
	$(PYTEST) $(DEFAULT)

# What is slow, and what needs ANOMALY_LIT_DATA and ANOMALY_LIT_WEIGHTS.
test-more: setup
	$(PYTEST) -m "(slow or real_data) and not gpu and not slurm"

# Jobs of the SLURM that scripts/slurm-here has started; the core of these tests takes some minutes.
test-slurm: setup
	$(BIN)/python -m pytest -m slurm tests/cluster

test-slurm-core: setup
	$(BIN)/python -m pytest -m slurm_core tests/cluster

# The tests of `make test`, with a table of the lines and branches that none of them runs.
coverage: setup
	$(PYTEST) $(DEFAULT) --cov --cov-report=term:skip-covered

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf outputs multirun build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
