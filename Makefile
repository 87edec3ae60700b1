# `make demo` and `make test` need git, make and Python >= 3.10 with venv; they make everything else themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
PYTHONS ?= 3.10 3.11 3.12 3.13

.DEFAULT_GOAL := help
.PHONY: help env demo test test-versions wheel docs gpu lint format constraints clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

env: $(STAMP) ## Make or update the environment in .venv

# Updated when the project's requirements change; made anew (--clear) when its Python is gone or does not run,
# because venv keeps links that lead nowhere.
ifneq ($(shell $(BIN)/python -c 'print(1)' 2>/dev/null),1)
.PHONY: $(STAMP)
VENV_FLAGS := --clear
endif
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python >= 3.10 with venv; install it, or name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: env ## Train a DiT on handwritten digits and classify with it
	$(BIN)/diffclf demo

# Two processes that compute with one thread each, and take files in their order: the last ones are short, so that both
# end about together. PYTEST_ARGS="-n 0 --pdb" for one.
test: lint ## Lint, check types and run all tests (make test PYTEST_ARGS="-k schedule")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-versions: env ## Run all tests on each Python with the newest dependencies, and on the first with the oldest
	@for python in $(PYTHONS); do $(call isolated,$$python,highest) || failed="$$failed $$python"; done; \
	$(call isolated,$(firstword $(PYTHONS)),lowest-direct) || failed="$$failed oldest"; \
	test -z "$$failed" || { echo "error: tests failed with:$$failed" >&2; exit 1; }

# uv finds or fetches the Python $(1), and chooses the $(2) versions that pyproject.toml allows.
isolated = $(BIN)/uv run --isolated --no-project --python $(1) --resolution $(2) --with-editable '.[test]' \
	python -m pytest -p no:cacheprovider $(PYTEST_ARGS)

wheel: env ## Build the wheel into dist/, and try it in an environment of its own
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	scripts/try_wheel.sh $(BIN)/python dist/*.whl

docs: env ## Build the documentation's site into build/docs/site
	$(BIN)/python scripts/make_docs.py

gpu: ## Measure one GPU in eight minutes, with the Python that is there (make gpu PYTHON=python3); installs nothing
	$(PYTHON) benchmarks/bench_gpu.py

lint: env ## Check style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .
	$(BIN)/mypy

format: env ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: env ## Write the installed versions to constraints.txt
	@{ grep '^#' constraints.txt; $(BIN)/python -c "$$PINS"; } >$(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt
	@touch $(STAMP)

# Everything that the dev extra brings, but not what torch pins itself. A version that cannot run on all of our Pythons
# is marked with the first one that it supports; older ones then take what suits them.
define PINS
import re, sys
from importlib.metadata import distribution
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

found, todo = {}, [("lightning-diffclf", "dev")]
while todo:
    name, extra = todo.pop()
    name = re.sub("[-_.]+", "-", name).lower()
    if (name, extra) in found or re.match("nvidia-|cuda-|triton$$", name):
        continue
    found[name, extra] = dist = distribution(name)
    for line in dist.requires or []:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            todo += [(need.name, e) for e in ("", *need.extras)]

for name, dist in sorted({name: dist for (name, _), dist in found.items()}.items()):
    if name != "lightning-diffclf":
        runs_on = SpecifierSet(dist.metadata["Requires-Python"] or "")
        first = next(m for m in range(10, sys.version_info[1] + 1) if runs_on.contains(f"3.{m}.99"))
        version = dist.version.split("+")[0]
        print(f"{name}=={version}" + (f' ; python_version >= "3.{first}"' if first > 10 else ""))
endef
export PINS

clean: ## Remove the environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
