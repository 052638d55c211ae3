PYTHON ?= python3
BIN := .venv/bin
ROOMS := config errors versions waiting models objectives data interop training evaluation planning benchmark miniature
INSTALL := $(BIN)/pip install -qq --no-compile --constraint constraints.txt --editable

# Modules are compiled to bytecode when first imported, not at installation: that takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test coverage lint fix docs clean

help: ## list these targets
	@awk -F ': .*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed ## the whole method in small, in minutes on a CPU; OUTPUT=DIR says where to
	$(BIN)/derta demo $(if $(OUTPUT),--output "$(OUTPUT)")

test: .venv/installed-dev ## all tests; ARGS="-k packing" for some of them
	$(BIN)/pytest -n auto $(ARGS)

coverage: .venv/installed-dev ## the same with coverage, which makes them half as slow again
	$(BIN)/pytest -n auto --cov=derta_jax --cov-report=term --cov-fail-under=90 $(ARGS)

lint: .venv/installed-dev ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fix: .venv/installed-dev ## format, and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/installed-dev ## the API reference, from docstrings, in build/api
	JAX_PLATFORMS=cpu $(BIN)/pdoc --output-directory build/api $(addprefix derta_jax.,$(ROOMS))

clean: ## remove .venv, caches and build products
	rm -rf .venv build dist .coverage .mypy_cache .pytest_cache .ruff_cache
	find derta_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "derta-jax needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --upgrade-deps .venv

.venv/installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing derta-jax into .venv, which takes about a minute ..."
	$(INSTALL) .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests and linters need, which takes another minute ..."
	$(INSTALL) '.[dev]'
	@touch $@
