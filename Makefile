# fraiseql-pipeline. `make` prints what there is. Everything runs in .venv, which sets itself up.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STATE := $(CURDIR)/.fraiseql
EVENTS ?= 300000

# `make demo` needs less than the tests do, so it does not wait for them to be installed.
RUN_READY := $(VENV)/.ready-demo
DEV_READY := $(VENV)/.ready-dev
DBT_READY := $(VENV)/.ready-dbt
CLIENTS_READY := $(VENV)/.ready-clients

# Where the lake begins, or the sample. Without FRAISEQL_START Dagster would show every hour since 2026-01-01 as missing beside those.
FIRST_WINDOW = $(BIN)/fraiseql-pipeline --json status | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["start"] or "")' \
  | grep . || test -n "$${FRAISEQL_DATABASE_URL:-}" || date -u -d '2 days ago' +%Y-%m-%d

# Dagster 1.13 calls `dagster dev` superseded by a tool that is a package of its own.
NOT_SUPERSEDED := ignore:Function `dev_command` is superseded

# Nothing a command of this file starts reports home.
export DAGSTER_DISABLE_TELEMETRY := yes
export DO_NOT_TRACK := 1
export DBT_SEND_ANONYMOUS_USAGE_STATS := false

.PHONY: help
help: ## Print this list
	@echo "make TARGET [PYTHON=python3] [EVENTS=300000] [ARGS=...]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

.PHONY: demo
demo: $(RUN_READY) ## Sample events in a real Postgres -> Dagster -> Delta -> an Arrow Flight read, in one go
	$(BIN)/fraiseql-pipeline demo --events $(EVENTS) $(ARGS)

.PHONY: test
test: $(DEV_READY) ## The quick tests, on real services (minutes)
	$(BIN)/pytest -m "not slow and not long and not clients" $(ARGS)

.PHONY: test-slow
test-slow: $(DEV_READY) ## The slow tests: wheel, backfills, daemons, kills
	$(BIN)/pytest -m "slow and not long" $(ARGS)

.PHONY: test-clients
test-clients: $(CLIENTS_READY) ## The example programs in Python, Java, Go and R; says what to install for those it skips
	$(BIN)/pytest -m clients tests/clients $(ARGS)

.PHONY: check
check: $(DEV_READY) ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: fix
fix: $(DEV_READY) ## Format and mend what the linter can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(RUN_READY) ## Measure materialize against its references (`make measure` measures everything)
	$(BIN)/fraiseql-pipeline bench materialize $(ARGS)

.PHONY: measure
measure: $(RUN_READY) ## Repeat every measurement and write the tables of the documents from it (on a quiet machine)
	@mkdir -p docs/measurements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench]'
	for bench in materialize "materialize --shape wide" windows convert flight "flight --shape wide" live; do \
	  $(BIN)/fraiseql-pipeline --json bench $$bench $(ARGS) > $(VENV)/bench.json || test $$? -eq 1; \
	  mv $(VENV)/bench.json "docs/measurements/$${bench// --shape /-}.json"; \
	done
	$(BIN)/python docs/tables.py

.PHONY: docs
docs: $(RUN_READY) ## Write the tables of the documents from the code
	$(BIN)/python docs/tables.py

.PHONY: dev
dev: $(RUN_READY) ## The Dagster UI with its daemon: partitions, schedules, backfills
	@mkdir -p $(STATE)/dagster && cp dagster.dev.yaml $(STATE)/dagster/dagster.yaml
	@test -n "$${FRAISEQL_DATABASE_URL:-}" || test -e $(STATE)/postgres/PG_VERSION || $(BIN)/fraiseql-pipeline sample --events $(EVENTS)
	@export FRAISEQL_START="$${FRAISEQL_START:-$$($(FIRST_WINDOW))}" DAGSTER_HOME="$${DAGSTER_HOME:-$(STATE)/dagster}"; \
	echo "Partitions start at $${FRAISEQL_START:-2026-01-01} (FRAISEQL_START)."; \
	echo "Schedules and the sensor are off; switch them on in the UI under Automation."; \
	PYTHONWARNINGS='$(NOT_SUPERSEDED)' $(BIN)/dagster dev $(ARGS)

.PHONY: serve
serve: $(RUN_READY) ## The Arrow Flight server over the lake
	$(BIN)/fraiseql-pipeline serve $(ARGS)

.PHONY: dbt
dbt: $(DBT_READY) ## Build and test the dbt project over the lake (run `make demo` first)
	@lake="$${FRAISEQL_LAKE_URI:-./.fraiseql/lake}"; \
	case "$$lake" in *://*) ;; *) lake="$$(realpath -m "$$lake")";; esac; \
	case "$$lake" in *://*) ;; *) test -d "$$lake/events" || { echo "There is no lake at $$lake yet; run \`make demo\` first." >&2; exit 2; };; esac; \
	cd dbt_examples && FRAISEQL_LAKE_URI="$$lake" $(abspath $(BIN))/dbt build --profiles-dir . $(ARGS)

.PHONY: ci
ci: ## What the continuous integration runs
	bash .ci/run

.PHONY: pins
pins: $(DEV_READY) ## Write constraints.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	{ head -n 1 constraints.txt; $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --no-header --no-annotate --no-emit-index-url --upgrade --quiet; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

.PHONY: clean
clean: ## Remove what runs left behind: databases, lakes, caches (not .venv)
	@! test -f $(STATE)/postgres/postmaster.pid || echo "Note: an embedded Postgres may still be running in .fraiseql/."
	rm -rf $(STATE) .tmp_dagster_home_* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build \
	  dbt_examples/target dbt_examples/logs examples/java/target
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and .venv too
	rm -rf $(VENV)

# ---------------------------------------------------------------------------------------------------------------- setup

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fraiseql-pipeline needs Python 3.11 or newer; name one: make PYTHON=python3.12 …" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV)

$(RUN_READY): pyproject.toml constraints.txt | $(BIN)/python
	@test -e $(DEV_READY) || echo "Installing what the demo needs (once, about a minute)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(DBT_READY): pyproject.toml constraints.txt | $(BIN)/python
	@test -e $(DEV_READY) || echo "Installing what dbt needs (once, about a minute)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dbt]'
	@touch $@ $(RUN_READY)

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what the tests need (once, a minute or two)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(RUN_READY) $(DBT_READY)

$(CLIENTS_READY): $(DEV_READY)
	@echo "Installing what the example programs need (once)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	@touch $@
