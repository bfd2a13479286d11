# On a fresh machine each target sets up what it needs; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
READY := .venv/.installed
CACHES := .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
PORT ?= 5000
ARGS ?=
# Files that are tested at once: as many as CI has cores.
JOBS ?= 2

.PHONY: help setup cross-validate tune test servers check format ui object-store lock clean clean-venv clean-outputs

help: ## List the targets
	@echo "make TARGET [ARGS='...'] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv from requirements.lock (every target below does it where needed)

$(READY): requirements.lock pyproject.toml
	@infra/setup.sh

cross-validate: $(READY) ## Cross-validate, on generated data unless ARGS say otherwise; ends with the fold table
	$(BIN)/python pipelines/cross_validate.py $(ARGS)

tune: $(READY) ## Search for training values, on generated data unless ARGS say otherwise; writes a recipe
	$(BIN)/python pipelines/tune.py $(ARGS)

test: ## The static checks, then the tests, JOBS=2 files at once (ARGS go to pytest; JOBS=0: one by one, for pdb)
	@$(MAKE) --no-print-directory -j 2 --output-sync=target check servers
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone $$(grep -rl 'mark\.alone' tests --include='test_*.py')
else
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
endif

# Downloads and installs while the environment is made and checked.
servers:
	@infra/setup.sh servers

check: $(READY) ## Lint, format, types and import directions only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict infra/*.py
	$(BIN)/lint-imports

format: $(READY) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ui: $(READY) ## MLflow's pages for outputs/mlflow.db, on this machine only (PORT=5000)
	@test -f outputs/mlflow.db || { echo "no outputs/mlflow.db yet: run make cross-validate first" >&2; exit 1; }
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui \
		--host 127.0.0.1 --port $(PORT) --backend-store-uri "sqlite:///$(CURDIR)/outputs/mlflow.db"

object-store: $(READY) ## A real S3 server on this machine, data in outputs/object_store (infra/object_store.sh does more)
	@infra/object_store.sh start

lock: ## Write requirements.lock from .venv, after installing what pyproject.toml asks for
	@infra/setup.sh lock

clean: ## Remove caches and build leftovers
	rm -rf $(CACHES)
	find mshnet pipelines tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

clean-venv: clean ## Remove .venv too
	rm -rf .venv

clean-outputs: ## Remove outputs/: generated data, stores, checkpoints, reports, MLflow's database, the object store
	@OBJECT_STORE_DIR= infra/object_store.sh stop
	rm -rf outputs
