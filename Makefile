# `make` shows what there is. Everything stays in this folder: .venv, runs/, _build/.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
CHAPTER ?=
PROFILE ?= cpu
PARAMS ?=
PYTEST_ARGS ?=
LOCK ?= requirements.lock
NTKBOOK := .venv/bin/ntkbook
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Of an environment that the user is in, which is not this one: IPython would warn of it.
unexport VIRTUAL_ENV

.PHONY: help install book html run store test lint clean distclean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## .venv with what requirements.lock (or LOCK=file) pins, and this package

# Once, and again when the lock or pyproject.toml changes.
$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else
	f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: say make PYTHON=python3.12")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	echo "Installing about $$(grep -c '==' $(LOCK)) packages into .venv (minutes, the first time)"
	.venv/bin/python -m pip install -r $(LOCK) | tee .venv/install.log | awk '
	  /^(Collecting|Requirement already satisfied)/ { printf "\r%4d packages found", ++n; fflush() }
	  /^  ?(Downloading|Using cached)/ && / GB| [0-9][0-9][0-9]\.?[0-9]* MB/ { printf "  %s", $$0; fflush() }
	  /^Installing collected packages/ { printf "\nunpacking and installing them\n"; fflush() }
	  END { print "" }'
	.venv/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

book: $(STAMP) ## run every chapter in the quick profile, build the book from these runs, print the scorecard
	@$(NTKBOOK) book

html: $(STAMP) ## build _build/html from the stored notebooks, running nothing
	@$(NTKBOOK) html

# By the environment, so that the shell takes none of their quotes for its own.
run store: export CHAPTER := $(CHAPTER)
run: export PROFILE := $(PROFILE)
run: export PARAMS := $(PARAMS)

run: $(STAMP) ## one chapter: make run CHAPTER=03 PROFILE=cpu PARAMS='seed: 3'
	@set -f
	$(NTKBOOK) run $$CHAPTER --profile "$$PROFILE" --params "$$PARAMS"

store: $(STAMP) ## execute chapters with their defaults and store them in book/ (CHAPTER=03, or all)
	@set -f
	$(NTKBOOK) store $$CHAPTER

test: $(STAMP) ## all tests, a file a process; PYTEST_ARGS="-n 0 tests/test_gp.py" for some in one
	@.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and pyright
	@.venv/bin/ruff check .
	.venv/bin/pyright

clean: ## remove runs/ and _build/
	@rm -rf runs _build

distclean: clean ## remove .venv too
	@rm -rf .venv
