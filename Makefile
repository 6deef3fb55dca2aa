# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
# Needs Python >= 3.11; a C++ compiler makes the CPU kernels available (without one: slower, same results).
# Options: PYTHON=/path/to/python3   the interpreter for .venv (default: the first that works)
#          PIP_OPTIONS="..."         passed to pip, e.g. an --index-url
#          DEMO_OPTIONS="..."        passed to the demo, e.g. --fresh, --minutes 1
#          TEST_OPTIONS="..."        passed to pytest, e.g. tests/numerics -x
#          SERVE_PYTHON=/path        the Python 3.11 for .venv-vllm
# Only relative paths appear here, so a folder with a space in its name is fine.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?=
SERVE_PYTHON ?=
PIP_OPTIONS ?=
DEMO_OPTIONS ?=
TEST_OPTIONS ?=
PY := .venv/bin/python
INSTALLED := .venv/.installed
SERVE_INSTALLED := .venv-vllm/.installed

.PHONY: help setup demo test test-oldest test-transformers-suite lint types check format bench images clean
.PHONY: serve-setup serve-test

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-23s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## create .venv with the pinned packages (a second call does nothing)
	@true

$(INSTALLED): pyproject.toml constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" PIP_OPTIONS="$(PIP_OPTIONS)" .ci/setup
	@printf '%s\n' "$(CURDIR)" > $@
# A folder that was renamed or copied carries a .venv that points to the old place.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

demo: setup  ## data, two models, text, speed and pictures in about ten minutes
	@$(PY) -m sambay.demo --out demo $(DEMO_OPTIONS)

test: setup  ## all tests of the default run (CPU)
	@$(PY) -m pytest -n auto $(TEST_OPTIONS)

# The package index's own dependencies stay; only transformers is shadowed by the older version.
test-oldest: setup  ## the tests of the Hugging Face classes with the oldest supported transformers
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
		--target build/oldest -r constraints-oldest.txt
	@PYTHONPATH=build/oldest $(PY) -m pytest -n auto tests/hf $(TEST_OPTIONS)

# TRANSFORMERS_SOURCE=/path/to/checkout adds the generation tests, which the source distribution lacks.
test-transformers-suite: setup  ## transformers' own model tests on our classes
	@.ci/transformers-suite $(TEST_OPTIONS)

serve-setup: $(SERVE_INSTALLED)  ## create .venv-vllm with vLLM for CPU and the pinned packages
	@true

$(SERVE_INSTALLED): pyproject.toml constraints-vllm.txt .ci/serve-setup
	@SERVE_PYTHON="$(SERVE_PYTHON)" PIP_OPTIONS="$(PIP_OPTIONS)" .ci/serve-setup
	@printf '%s\n' "$(CURDIR)" > $@
ifneq ($(shell cat $(SERVE_INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(SERVE_INSTALLED)
endif

# Longer ones (load, memory, more engines): make serve-test TEST_OPTIONS="-m slow"
serve-test: serve-setup  ## the tests of the vLLM plugin in .venv-vllm
	@.venv-vllm/bin/python -m pytest tests/serve -p no:cacheprovider $(TEST_OPTIONS)

lint: setup  ## ruff: rules and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: setup  ## pyright
	@$(PY) -m pyright

check: lint types test  ## everything a change must pass

format: setup  ## let ruff repair what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: setup  ## benchmarks on this machine, as JSON under build/benchmarks
	@for name in scan recurrent training prefill decode huggingface evaluation; do \
		echo "== $$name"; $(PY) -m benchmarks.$$name --out build/benchmarks/$$name.json; \
	done

images: setup  ## redraw docs/images from the model configurations
	@$(PY) -m sambay.plots --out docs/images

clean:  ## remove .venv, caches, runs and the demo's output
	rm -rf .venv .venv-vllm build dist demo runs .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
