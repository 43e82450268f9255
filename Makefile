# `make run` and `make test` need Python ≥ 3.11, make and git; everything else is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
STAMP  := $(VENV)/.installed
# Not --quiet: with it mkdocs does not count warnings, and --strict means nothing.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each starts a PostgreSQL and a Kafka of its own; the tests of one file stay together.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help run env test check docs format bench chaos audit sbom clean

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

run: $(STAMP) ## Start everything, play the story, show it live (Ctrl-C stops it all)
	@exec $(BIN)/python -m workers up

env: $(STAMP) ## Make .venv and fetch the embedded servers
	@$(BIN)/python -m workers.embedded fetch

test: $(STAMP) ## Run every test against real Kafka and PostgreSQL
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## Format check, lint, strict types, import contract, drift of what is generated, manifests, links, the site
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m workers schemas --check
	@$(BIN)/python deploy/generate.py --check
	@$(BIN)/python -m pytest --quiet --no-header tests/deploy/test_manifests.py
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/docs/test_links.py tests/docs/test_blocks.py
	@mkdir -p reports && { $(MKDOCS) 2> reports/site.log || { cat reports/site.log; exit 1; }; }

docs: $(STAMP) ## Build the documentation site into reports/site; a broken link or anchor fails
	@$(MKDOCS)

format: $(STAMP) ## Format and apply safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure this worker beside others (ARGS="--case uniform"); writes reports/bench.{md,json}
	@$(BIN)/python -m benchmarks $(ARGS)

chaos: $(STAMP) ## Break everything around the workers and count losses (ARGS='--faults 1000'); writes reports/chaos.{md,json}
	@$(BIN)/python -m chaos $(ARGS)

audit: $(STAMP) ## Ask what is known against the packages that are shipped
	@$(BIN)/python deploy/supply_chain.py audit

sbom: $(STAMP) ## Write what is shipped, with hashes and licences: reports/{sbom.json,licences.md}
	@$(BIN)/python deploy/supply_chain.py sbom

clean: ## Remove the environment and the embedded servers' state
	rm -rf $(VENV) .credits reports

# uv lives in the environment that it fills, so a machine needs no tool but Python.
$(STAMP): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit("credit-workers needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.11+") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	@VIRTUAL_ENV='$(CURDIR)/$(VENV)' UV_PYTHON_DOWNLOADS=never $(UV) sync --active --frozen --inexact --all-extras --all-groups
	@touch $(STAMP)
