# Two commands on a fresh machine with python3 >= 3.11: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow faults check lock schemas clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## sets up .venv from requirements.lock (does nothing the second time)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nayer-edge needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Type: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
ifneq ($(UV),)
	test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV)
	uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	uv pip install --quiet --python $(BIN)/python --no-deps --editable .
else
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
endif
	@touch $@

quickstart: install  ## the whole pipeline on real handwritten digits, into runs/digits
	$(BIN)/nayer-edge quickstart

test: install  ## the test suite, under 15 minutes on two cores
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-slow: install  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

faults: install  ## does every kind of fault many times, and counts what was lost (nothing), under ten minutes
	$(BIN)/python -m tests.faults

# Types are checked on what ships: editors and checkers cannot follow the mapping of an editable install.
check: install  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && mkdir -p build
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target build/shipped .
	cp pyproject.toml build/shipped/
	$(BIN)/basedpyright --project build/shipped --pythonpath $(BIN)/python --level error
	rm -rf build

schemas: install  ## writes the published JSON Schemas and docs/REFERENCE.md anew
	$(BIN)/python -m nayer_edge.pipelines.schemas
	$(BIN)/python -m nayer_edge.pipelines.schemas.reference >docs/REFERENCE.md

lock:  ## resolves requirements.lock anew (needs uv); it names no index
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --no-header --quiet --upgrade --extra cpu --extra rtx --extra lm --extra timm \
		--extra sign --extra sbom --extra tracking --extra dev --output-file requirements.lock

clean:  ## removes the environment and what was built, never a run
	rm -rf $(VENV) build dist *.egg-info
