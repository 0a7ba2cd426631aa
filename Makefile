# Local verbs are the CI's verbs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup check test demo bench soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/pytest -n 2 --cov=memreason --cov-report=term

demo: setup
	$(BIN)/memreason run demo

soak: setup
	$(BIN)/pytest -m soak

# SHARED is a folder with the published files: data/labelled and data/outputs.
SHARED ?= ../shared
bench: setup
	$(BIN)/python benchmarks/published_verdicts.py --shared $(SHARED)
	$(BIN)/python benchmarks/published_arguments.py --shared $(SHARED)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
