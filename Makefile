# `make demo` and `make test` need git, make and Python >= 3.10 with venv; they make everything else themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
RUN_DIR := runs/dit_digits

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format constraints clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(STAMP) ## Make or update the environment in .venv

# Rebuilt when the project's requirements change, or when its Python is gone.
ifneq ($(shell $(BIN)/python -c 'print(1)' 2>/dev/null),1)
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python >= 3.10 with venv; install it, or name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: env ## Train a DiT on handwritten digits and classify with it
	$(BIN)/python train.py --config dit_digits.yaml
	$(BIN)/python evaluate.py --ckpt $(RUN_DIR)/checkpoints/last.ckpt
	@echo "generated digits: $(RUN_DIR)/samples.png; results: $(RUN_DIR)/evaluation*"

test: lint ## Lint, check types and run all tests (make test PYTEST_ARGS="-k schedule")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: env ## Check style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .
	$(BIN)/mypy

format: env ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: env ## Print the installed versions, to refresh constraints.txt
	@$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|cuda|triton)' | sed 's/+cu[0-9]*//'

clean: ## Remove the environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
