# Two commands do everything: `make demo` and `make test`. A rerun of either takes seconds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
GET_MODEL = $(BIN)/python examples/get_model.py $(if $(MODEL),--source '$(MODEL)')
# A file stays with one of the two; in the order of collection the long tests of real processes come first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

CHECKS := check-format check-lint check-types check-imports

.PHONY: help demo up down test check $(CHECKS) format oracle fuzz chaos gpu-check env model test-tools clean

help:
	@echo "make demo       a real model answers, cold and warm, then everything is stopped"
	@echo "make up / down  the same services left running in the background / stopped"
	@echo "make test       every test, with a real etcd and a real model"
	@echo "make check      format, lint, types, import contracts"
	@echo "make fuzz       100,000 mutated files to every reader of checkpoints"
	@echo "make chaos      64 streams over 4 nodes for 10 minutes, a fault every few seconds: none may change"
	@echo "make oracle     the real model, killed and moved after every token, answers the same bits"
	@echo "make gpu-check  the tests that need a CUDA device"
	@echo "MODEL=...       hub id or local folder to use instead of SmolLM2-135M-Instruct"

# --- environment -------------------------------------------------------------------------------------------

env: $(VENV)/.installed $(VENV)/.protos

$(VENV)/.installed: pyproject.toml constraints.txt build_protos.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Stoker needs Python 3.11 or newer: $(PYTHON) is older; set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.protos

$(VENV)/.protos: $(wildcard protos/stoker/v1/*.proto) $(VENV)/.installed
	@echo "generating stubs ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

model: env
	@$(GET_MODEL)

# What the tests need from the system: an etcd server, and compose to read the compose files.
test-tools:
	@missing=""; \
	command -v etcd >/dev/null || missing="$$missing etcd-server"; \
	command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 \
	  || missing="$$missing docker-compose"; \
	test -z "$$missing" || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$missing ..."; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
	      apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null; \
	  else \
	    echo "the tests need$$missing: run 'sudo apt-get install$$missing' (Debian, Ubuntu), then try again"; \
	    exit 1; \
	  fi; }

# --- the product -------------------------------------------------------------------------------------------

demo: env
	@$(BIN)/python examples/demo.py $(if $(MODEL),--source '$(MODEL)')

up: env
	@model=$$($(GET_MODEL)) && $(BIN)/stoker up --detach --deploy "smollm2=$$model"

down: env
	@$(BIN)/stoker down

# --- proof -------------------------------------------------------------------------------------------------

test: env test-tools
	@model=$$($(GET_MODEL)) && STOKER_TEST_MODEL="$$model" OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# All at once, each one's words in one piece; any that fails fails the whole, after the others have had their say.
check: env
	@$(MAKE) --no-print-directory --keep-going --jobs 4 --output-sync=target $(CHECKS)

check-format:
	@$(BIN)/ruff format --check .

check-lint:
	@$(BIN)/ruff check .

# Two processes; 2 = they did not start within the 3 s that mypy gives them, on a very busy machine.
check-types:
	@$(BIN)/mypy --num-workers 2; code=$$?; test $$code -ne 2 || { $(BIN)/mypy; code=$$?; }; exit $$code

check-imports:
	@$(BIN)/lint-imports

format: env
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

fuzz: env
	@$(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),100000)

# ARGS='--seconds 60 --streams 16 --nodes 3 --seed 7' and so on; --help says what there is.
chaos: env
	@$(BIN)/python -m tests.chaos $(ARGS)

# Every position of a kill and of a move on the real model; an hour or more. In parts, each going on where the one before
# ended: ORACLE_ARGS='--results oracle.jsonl --limit-seconds 600', or ORACLE_ARGS='--only float32-*'.
oracle: env
	@model=$$($(GET_MODEL)) && OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.oracle "$$model" $(ORACLE_ARGS)

gpu-check: env
	@$(BIN)/python -m pytest tests/gpu -m gpu -rs -s

clean:
	rm -rf $(VENV) .cache .data stoker/v1 .mypy_cache .ruff_cache .pytest_cache .hypothesis
