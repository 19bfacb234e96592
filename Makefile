# blockpress: `make demo` shows it, `make test` proves it. Only python3 (3.11 or newer) and make are needed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# 0: all tests in one process, so that what they report at the end is printed; 2 is faster on idle cores. A file's tests
# stay in one process, or every process would make what the file makes once; those with what takes long are handed out first.
WORKERS ?= 0

.PHONY: demo test test-fast shapes check clients suites format readme clean format-check lint types contracts check-gpu bench-gpu
.NOTPARALLEL:
.DEFAULT_GOAL := demo

# pip in a pipe says everything or, with --quiet, nothing for minutes: this keeps the large downloads, and what went wrong.
define install
	@echo "Installing $(1) into $(VENV): some sixty packages, of which torch is the large one"
	@set -o pipefail; $(BIN)/python -m pip install --progress-bar off --editable "$(1)" 2>$(VENV)/pip.log \
	| while read -r what which rest; do \
		case "$$what $$which $$rest" in \
			"Installing collected "*) echo "  unpacking" ;; \
			"Using cached "*MB*) echo "  $$rest" ;; \
			*/torch-*|*torch-*.whl*|"Downloading "*MB*) echo "  $${which##*/} $${rest%%(from *}" ;; \
		esac; \
	done || { cat $(VENV)/pip.log; exit 1; }
endef

demo: $(VENV)/.installed
	@$(BIN)/blockpress sudoku --random 1 --givens 45 --seed $${SEED:-$$RANDOM}

# Python keeps what it has compiled, whatever the environment says: else each process that a test starts compiles it anew.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.developing
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# For while you write: what loads no oracle, interprets no kernel and takes no seconds, and of what hypothesis draws a fifth.
test-fast: WORKERS = 2
test-fast: override PYTEST_ARGS += --hypothesis-profile fast -m "not parity and not interpreter and not slow"
test-fast: test

# The rooms where tensors travel, and what is tested there of parts alone: each call checks the shapes that its annotations
# state, which takes most of its time. The doors (lm, text, config, cli) take wrong values on purpose, to refuse them by name.
SHAPED := ops model diffusion quantize checkpoints decoding train evals
SHAPED += engine.batch engine.cuda_graphs engine.attention engine.runner engine.canvas_state engine.denoising engine.kv_cache engine.modes
SHAPED += constrain.constraint constrain.filling constrain.posterior constrain.tokens
SHAPE_TESTS := $(addprefix tests/,ops model diffusion quantize multimodal decoding engine train evals)
SHAPE_TESTS += $(foreach name,load packed gguf integers types save round_trip,tests/checkpoints/test_$(name).py)
SHAPE_TESTS += $(foreach name,filling posterior tokens turns,tests/constrain/test_$(name).py)
comma := ,
space := $(subst ,, )
shapes: export PYTHONDONTWRITEBYTECODE :=
shapes: $(VENV)/.developing
	@echo "== shapes" && $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --hypothesis-profile fast --quiet \
		--jaxtyping-packages=$(subst $(space),$(comma),$(SHAPED:%=blockpress.%))$(comma)beartype.beartype \
		-m "not parity and not interpreter and not slow and not end_to_end" $(SHAPE_TESTS)

check: format-check lint types contracts test shapes

format-check: $(VENV)/.developing
	@echo "== format" && $(BIN)/ruff format --check .

lint: $(VENV)/.developing
	@echo "== lint" && $(BIN)/ruff check .

types: $(VENV)/.developing
	@echo "== types" && $(BIN)/mypy

contracts: $(VENV)/.developing
	@echo "== contracts" && $(BIN)/lint-imports

format: $(VENV)/.developing
	@$(BIN)/ruff check --fix --exit-zero --quiet . && $(BIN)/ruff format .

readme: $(VENV)/.developing
	@$(BIN)/python tests/docs/readme.py

# Clients that others wrote, each in an environment of its own under build/clients, from PyPI and npm: a table by feature.
clients: $(VENV)/.developing
	@$(BIN)/python -m tests.clients.run $(CLIENTS)

# Suites that others wrote, against our server: schemathesis, lm-eval, jevbench, guidellm. Minutes, most of them the first one's.
suites: $(VENV)/.developing
	@$(BIN)/python -m tests.clients.suites $(SUITES)

# On a machine with a GPU: no environment is made, since torch and Triton of that machine are the ones to measure.
check-gpu:
	@PYTHONPATH=. $(PYTHON) -m blockpress.bench.gpu check

bench-gpu:
	@PYTHONPATH=. $(PYTHON) -m blockpress.bench.gpu bench $(if $(PART),--part $(PART))

clean:
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find blockpress tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "blockpress needs Python 3.11 or newer, and there is no '$(PYTHON)' here: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blockpress needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' comes without its venv module: install it first (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	$(call install,.)
	@touch $@

$(VENV)/.developing: pyproject.toml | $(VENV)/.made
	$(call install,.[dev])
	@touch $(VENV)/.installed $@
