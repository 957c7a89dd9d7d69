# make run     set up, then stream an answer from SmolLM2 (PROMPT="..." asks something else)
# make test    set up, then lint, types and tests (PYTEST_ARGS="-k tree" narrows them, WORKERS=0 runs one by one)
# make benchmark PROMPTS=FOLDER OUT=FOLDER   measure speed, rounds and long prompts (PAIR="ONE TWO", BENCH_ARGS="--limit 10")
# make options   write docs/reference/options.md anew, from the commands
# make site      the documents as a web site in build/site
# make lock    resolve requirements.lock anew
# make clean   remove the environment and every cache

PYTHON ?= python3
VENV   ?= .venv
SITE   ?= .venv-docs
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export PROMPT ?= Write a Python function that returns the mean of a list of numbers, and explain it.
PYTEST_ARGS ?=
# Processes that run tests side by side.
WORKERS ?= 2
PAIR ?= smollm2-135m
PROMPTS ?=
OUT ?=
BENCH_ARGS ?=
UV_ARGS ?=
# The release that `make lock` pins: the newest one with a CPU build where the lock is made.
TORCH ?= 2.13.0
# The release with which optimum-intel exports the most architectures (docs/reference/families.md).
TRANSFORMERS ?= 5.0.0

.PHONY: run test lint types benchmark options site lock clean
.DELETE_ON_ERROR:

run: $(READY)
	@$(BIN)/dovetail-run "$$PROMPT"

test: lint types
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

benchmark: $(READY)
	@test -n "$(PROMPTS)" -a -n "$(OUT)" || { echo "error: name the folders, make benchmark PROMPTS=... OUT=..." >&2; exit 2; }
	$(BIN)/python tests/bench/table.py $(PAIR) --prompts "$(PROMPTS)" --out "$(OUT)" $(BENCH_ARGS)

options: $(READY)
	$(BIN)/python docs/make_options.py

# In an environment of its own: the site needs nothing of Dovetail's, and the lock nothing of the site's.
site:
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	$(SITE)/bin/python docs/make_site.py

# The lock is complete, hence --no-deps. A CUDA build of torch needs libraries that a CPU build, which the lock was made
# with, does not: where pip found such a build, its own dependencies are installed with it.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	@touch $@

lock:
	printf 'torch==$(TORCH)\ntransformers==$(TRANSFORMERS)\n' | uv pip compile pyproject.toml - --extra export --extra serve --extra webgpu --extra dev --python-version 3.11 --no-annotate --quiet --no-header \
	  --no-emit-package torchvision --no-emit-package pip $(UV_ARGS) \
	  | sed 's/^\(torch==[0-9.]*\)+cpu$$/\1/' > requirements.body
	{ sed -n '/^#/p' requirements.lock; cat requirements.body; } > requirements.new
	mv requirements.new requirements.lock && rm requirements.body

clean:
	rm -rf $(VENV) $(SITE) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find exporter models runtime tests -name __pycache__ -type d -prune -exec rm -rf {} +
