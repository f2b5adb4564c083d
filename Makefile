# One entry for people and CI; `make help` lists the targets.
# The two that a newcomer needs are `make tune` and `make test`: each makes .venv and installs what it
# needs, once. Later runs find the stamps and need no network.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
JOBS ?= auto
BIN := .venv/bin
BASE := .venv/.installed-base
DEV := .venv/.installed-dev
# mypy and pyright take tests and benchmarks too, as soon as there are any
CHECKED := $(wildcard tests benchmarks)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	-c constraints.txt
# One line per package that is fetched, so that one sees it move; errors come on stderr, unfiltered.
TERSE := awk '/^ *(Downloading|Processing) / && !/\.metadata/ \
	{ n = split($$2, path, "/"); sub(/-(py|cp)[0-9].*/, "", path[n]); \
	  print "  " path[n], ($$1 == "Downloading" ? $$3 " " $$4 : ""); fflush() } \
	/^Installing/ { print "  unpacking all of these ..."; fflush() }'

.PHONY: help setup tune test test-gpu check bench docs report clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV)  ## make .venv with everything for development

tune: $(BASE)  ## tune the embedded miniature model: make tune ARGS="--trials 20"
	$(BIN)/tune run --miniature --time-limit 4 $(ARGS)

test: $(DEV)  ## run the tests, a process per core: make test ARGS="tests/db -k lookup" JOBS=0 uses one
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-gpu: $(DEV)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

check: $(DEV)  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy $(CHECKED)

bench: $(DEV)  ## run every benchmark; rows go to bench-out/, older ones stay: make bench ARGS=--quick
	@mkdir -p bench-out
	@stamp=$$(date -u +%Y%m%dT%H%M%SZ); \
	for file in benchmarks/[a-z]*.py; do \
	  name=$$(basename "$$file" .py); echo "== $$name"; \
	  $(BIN)/python -m "benchmarks.$$name" --json "bench-out/$$name-$$stamp.json" $(ARGS); \
	done

docs: $(BASE)  ## write docs/cli.md anew from the help texts of the commands
	$(BIN)/typer ditune.cli.main utils docs --name tune --output docs/cli.md

report: $(BASE)  ## write the HTML report of the last study anew
	$(BIN)/tune report $(ARGS)

clean:  ## remove caches and build products; .venv, results and databases stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# pip, not python, is the sign that .venv is whole: without ensurepip a broken .venv has a python only.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ditune needs Python 3.11 or later, and $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

$(BASE): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing ditune and what it needs into .venv (once; some minutes) ..."
	@$(INSTALL) -e . | $(TERSE)
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing ditune with its development tools into .venv (once; some minutes) ..."
	@$(INSTALL) -e '.[dev,peers,postgres]' | $(TERSE)
	@touch $(BASE) $@
