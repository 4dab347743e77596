# `make demo` and `make test` need only Python 3.11 or newer; they install into .venv.
# Each kind of installation leaves a stamp file, so that a second run starts at once.

VENV ?= .venv
ARGS ?=
PIP_FLAGS ?= $(if $(CI),--quiet)
# How install/environment.py chooses PyTorch: TORCH=cpu or index, and another index, for example TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= auto
TORCH_INDEX ?=
# Choose an interpreter with PYTHON=...; the default is the first of these that is at least 3.11 and can make a venv.
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.12 python3.11 python3.13 python3.14 python3 python)

BIN := $(VENV)/bin
# Tests run in several processes, one per core up to four, as each imports everything.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
INSTALL := $(BIN)/python install/environment.py --pip-flags="$(PIP_FLAGS)" --torch $(TORCH) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
STAMPED_BY := pyproject.toml constraints.txt install/environment.py $(VENV)/.stamp-venv

ifeq ($(OS),Windows_NT)
$(error this Makefile is for Linux and macOS; on Windows use WSL, or install with: pip install -c constraints.txt ".[llm]")
endif

.DEFAULT_GOAL := help
.NOTPARALLEL: # two installations into one environment must not overlap
.PHONY: help demo heads bench test test-all test-versions test-engines sanitize dist lint style types format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.stamp-llm ## the main job on a real model, in moh-demo/; options: make demo ARGS="--help"
	$(BIN)/moh demo $(ARGS)

# The demo's base model, converted by the default settings; or MODEL=DIR of your own, such as moh-demo/model.
MODEL ?= smollm2-moh-default
smollm2-moh-default: | $(VENV)/.stamp-llm
	$(BIN)/moh convert "$$($(BIN)/python -c 'from moh.demo.base_model import default_base_model as model; print(model())')" $@

heads: $(VENV)/.stamp-llm | $(MODEL) ## the page of heads, docs/heads.html; of another model: make heads MODEL=moh-demo/model
	$(BIN)/moh inspect $(MODEL) --html docs/heads.html \
		$(foreach text,story code recipe french,--group $(text)=examples/texts/$(text).txt)

bench: $(VENV)/.stamp-llm ## speed against dense attention, into docs/results/; options: make bench ARGS="--help"
	$(BIN)/python -m benchmarks $(ARGS)

test: $(VENV)/.stamp-dev ## the fast tests; options for pytest: make test ARGS="-k routing"
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.stamp-dev ## all tests, the slow ones too
	$(PYTEST) -m "" $(ARGS)

test-versions: $(VENV)/.stamp-venv ## the models' tests with the oldest and the newest libraries; options: make test-versions ARGS="--help"
	$(BIN)/python tests/versions.py $(ARGS)

test-engines: $(VENV)/.stamp-dev ## our models in ONNX Runtime, OpenVINO, ExecuTorch and vLLM (3 GB), on the CPU; options: make test-engines ARGS="--help"
	$(BIN)/python tests/engines_on_cpu.py $(ARGS)

sanitize: $(VENV)/.stamp-dev ## the CPU kernels' tests under GCC's address and undefined-behaviour sanitizers
	tests/sanitize/run.sh $(abspath $(BIN))/python $(ARGS)

dist: $(VENV)/.stamp-venv ## build sdist and wheel into dist/, install the wheel elsewhere and run README.md's snippets there
	$(BIN)/python install/dist.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(ARGS)

lint: style types ## ruff and mypy

style: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs ## build the documentation into site/
	$(BIN)/python docs/generate_cli.py
	$(BIN)/zensical build --clean --strict

clean: ## remove .venv and .venv-versions, caches and built files; results (moh-demo/, runs/) stay
	rm -rf "$(VENV)" .venv-versions build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.stamp-llm: $(STAMPED_BY)
	$(INSTALL) llm
	@touch $@

$(VENV)/.stamp-dev: $(STAMPED_BY)
	$(INSTALL) all test lint
	@touch $@

$(VENV)/.stamp-docs: $(STAMPED_BY)
	$(INSTALL) docs
	@touch $@

# A working environment is kept; a broken one (moved, half made, too old) is made again.
$(VENV)/.stamp-venv:
	@ok='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if "$(BIN)/python" -c "$$ok" 2>/dev/null && "$(BIN)/python" -m pip --version >/dev/null 2>&1; then \
		touch $@; exit 0; \
	fi; \
	python=; bare=; \
	for candidate in $(CANDIDATES); do \
		"$$candidate" -c "$$ok" >/dev/null 2>&1 || continue; \
		if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then python=$$candidate; break; fi; \
		bare=$$candidate; \
	done; \
	if [ -n "$$python" ]; then \
		echo "Creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear "$(VENV)" && touch $@; \
	elif [ -n "$$bare" ]; then \
		echo "make: $$bare cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	else \
		echo "make: no Python 3.11 or newer among: $(CANDIDATES)" >&2; \
		echo "make: install one, or name it: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi
