# Two commands on a fresh machine with python3 >= 3.11: `make quickstart` and `make test`. pip is enough; uv is faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
UV := $(shell command -v uv 2>/dev/null)
AGAIN = type: make $(MAKECMDGOALS) $(MAKEOVERRIDES)

ifneq ($(UV),)
CREATE := $(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
NEEDED :=
else
CREATE := $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NEEDED := pip
endif

# Succeeds in an environment where an interrupted installation has left nothing half written. Of every package, INSTALLER
# is the last file that pip and uv add.
define WHOLE
import sys, sysconfig
from pathlib import Path
packages = list(Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
missing = set(sys.argv[1:]) - {package.name.partition("-")[0] for package in packages}
half = [package for package in packages if not (package / "INSTALLER").is_file()]
sys.exit(sys.version_info < (3, 11) or bool(missing or half))
endef
export WHOLE

# $(call install,LOCK) installs what LOCK pins, and nayer-edge itself. The lock is complete, so dependencies are not
# resolved: pip refuses a lock with hashes when a dependency asks for an extra of another package.
define install
@$(BIN)/python -c "$$WHOLE" $(NEEDED) 2>/dev/null && exit; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "nayer-edge needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Type: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	exit 2; }; \
	test -n "$(UV)" || $(PYTHON) -c 'import ensurepip, venv' || { \
	echo "$(PYTHON) cannot create virtual environments. Debian and Ubuntu: apt install python3-venv. Then $(AGAIN)" >&2; \
	exit 2; }; \
	if test -f $(VENV)/pyvenv.cfg; then echo "$(VENV) is unfinished or too old. Creating a new one."; rm -rf $(VENV); fi; \
	$(CREATE) || { code=$$?; \
	echo "$(VENV) could not be created (see above). Is the folder writable, and is there space left? Then $(AGAIN)" >&2; \
	exit $$code; }
@echo "Installing the packages of $(1) into $(VENV). The first time, this takes minutes."
@trap 'exit 130' INT; { $(INSTALL) --no-deps --require-hashes -r $(1) && \
	$(INSTALL) --no-deps --no-build-isolation --editable .; } || { code=$$?; \
	echo "The installation failed; the message above names the package and the reason. If a package could not be" >&2; \
	echo "fetched, check the network (behind a proxy: set HTTPS_PROXY). Then $(AGAIN)" >&2; \
	exit $$code; }
@touch $(INSTALLED) $@
endef

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-slow test-random faults check lock schemas clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## sets up .venv from requirements.lock (does nothing the second time)

install-dev: $(INSTALLED_DEV)  ## the same, and what tests and checks need, from requirements-dev.lock

$(INSTALLED): requirements.lock pyproject.toml
	$(call install,requirements.lock)

$(INSTALLED_DEV): requirements-dev.lock $(INSTALLED)
	$(call install,requirements-dev.lock)

quickstart: install  ## the whole pipeline on real handwritten digits, into runs/digits
	$(BIN)/nayer-edge quickstart

# The tests start many processes; whatever the machine's settings, they share what Python has compiled.
test: install-dev  ## the test suite, two to ten minutes on two cores, depending on the processor
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-slow: install-dev  ## the slow tests, or with PART=K/N the K-th of N parts
	$(BIN)/python -m pytest -m slow $(if $(PART),--slow-part $(PART)) -n auto --maxprocesses 8 --dist worksteal

test-random: install-dev  ## the property tests with other random examples
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile random -n auto --maxprocesses 8 --dist worksteal

faults: install-dev  ## does every kind of fault many times, and counts what was lost (nothing), under ten minutes
	$(BIN)/python -m tests.faults

# Types are checked on what ships: editors and checkers cannot follow the mapping of an editable install.
check: install-dev  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && mkdir -p build
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target build/shipped .
	cp pyproject.toml build/shipped/
	$(BIN)/basedpyright --project build/shipped --pythonpath $(BIN)/python --level error
	rm -rf build

schemas: install  ## writes the published JSON Schemas and docs/REFERENCE.md
	$(BIN)/python -m nayer_edge.pipelines.schemas
	$(BIN)/python -m nayer_edge.pipelines.schemas.reference >docs/REFERENCE.md

RESOLVE := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-annotate --no-header --quiet --upgrade --override requirements.overrides

lock:  ## resolves both locks again (needs uv); they name no index
	$(RESOLVE) --extra cpu --extra rtx --extra lm --extra timm --extra sign --extra sbom --extra tracking --extra ray --extra dev \
		--output-file requirements-dev.lock
	echo setuptools | $(RESOLVE) - --extra cpu --constraint requirements-dev.lock --output-file requirements.lock

clean:  ## removes the environment and what was built, never a run
	rm -rf $(VENV) build dist *.egg-info
