# All set-up happens here, on first use, into .venv; later calls reuse it. `make help` lists what there is.
#   PYTHON=/path/to/python3   which Python makes the .venv (3.11 or newer)
#   PORT=8000 HOST=…          where `make demo` listens (127.0.0.1:7860 otherwise)

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# The pip that comes with Python 3.11 takes 2.5 times as long to read the package index. Newer ones pass on setuptools'
# warnings about editable installations. Bytecode is compiled on all cores and not on one, without the packages' own
# tests; some packages hold templates that are no Python, which is no failure.
define install
@$(PIP) 'pip>=26,<27'
@PYTHONWARNINGS=ignore $(PIP) --no-compile -e '$(1)' -c constraints.txt
@$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
endef

# Three processes share the tests, file by file, on two cores: a third of a test's time is waiting. What measures is
# marked slow and runs alone.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder

# Otherwise each process that the tests start compiles our modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types format pytest clients serving dev docs notebooks pictures clean

help: ## List the commands
	@echo "make demo      start the app on http://127.0.0.1:7860 (installs what serving needs on first use)"
	@echo "make test      format, lint and type checks, then every test (installs what tests need on first use)"
	@echo "make lint      ruff, import-linter (layers), zizmor (workflows), strict build of the manual; changes nothing"
	@echo "make types     mypy --strict"
	@echo "make pytest    the tests alone; ARGS='-k engine -x' narrows them, ARGS='-m slow' runs the slow ones"
	@echo "make clients   install programs that speak OpenAI's API (Python and Node) and run them against the service"
	@echo "make format    ruff: format the code"
	@echo "make serving   install what serving needs, start nothing"
	@echo "make dev       install what changing the project needs, start nothing"
	@echo "make docs      build the manual in docs/ into site/; fails on a broken link"
	@echo "make notebooks execute the notebooks and store their outputs; ONLY='02 03' names some"
	@echo "make pictures  make the manual's pictures of all pages again, with Chromium"
	@echo "make clean     remove caches and build leftovers; .venv, data and runs stay"

# The first Python that runs, is new enough and can make environments. A name on the PATH may be a shim that
# refuses to run, so each candidate is tried, not only looked up.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

$(VENV)/.made:
	@if $(BIN)/python -c '$(NEW_ENOUGH); import pip' >/dev/null 2>&1; then touch $@; exit 0; fi; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if $$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    $$python -m venv --clear $(VENV) && touch $@; exit $$?; \
	  fi; \
	done; \
	echo "write-me-a-story needs Python 3.11 or newer with its venv module (Debian: python3 python3-venv)." >&2; \
	echo "None was found on the PATH; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1

MANUAL = $(BIN)/zensical build --clean --strict

# The decoder in C, which an installation builds where there is a compiler.
NATIVE := $(wildcard model/runtimes/native/csrc/*.[ch])

# A stamp is newer than the files that say what to install or hold what is built, or the set is installed again.
$(VENV)/.serving: $(VENV)/.made pyproject.toml setup.py constraints.txt $(NATIVE)
	@echo "installing what serving needs"
	$(call install,.)
	@touch $@

# The larger set holds the smaller one, so that `make demo` after `make test` installs nothing.
$(VENV)/.dev: $(VENV)/.made pyproject.toml setup.py constraints.txt $(NATIVE)
	@echo "installing what tests and training need"
	$(call install,.[dev])
	@touch $(VENV)/.serving $@

serving: $(VENV)/.serving
dev: $(VENV)/.dev

demo: $(VENV)/.serving
	@$(BIN)/story demo

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(MANUAL)
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

# Programs of others that speak the API, in an environment of their own: they are large, and none of ours. They find the
# development environment's packages behind their own, torch above all, which is not installed twice.
CLIENTS := $(VENV)/clients
CLIENTS_FROM := $(wildcard tests/clients/*.txt) tests/clients/package.json
UV := $(CLIENTS)/bin/uv
UV_INSTALL := $(UV) pip install --quiet --override tests/clients/overrides.txt

$(CLIENTS)/.made: $(VENV)/.dev $(CLIENTS_FROM)
	@echo "installing the clients"
	@$(BIN)/python -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet uv
	@$(UV) venv --quiet --allow-existing --python $(BIN)/python $(CLIENTS)/vllm
	@$(UV_INSTALL) --python $(CLIENTS) -r tests/clients/requirements.txt
	@$(UV_INSTALL) --python $(CLIENTS)/vllm -r tests/clients/vllm.txt
	@for packages in $(CLIENTS)/lib/python*/site-packages $(CLIENTS)/vllm/lib/python*/site-packages; do \
	  (cd $(VENV)/lib/python*/site-packages && pwd) >$$packages/development.pth || exit 1; \
	done
	@if $(UV) venv --quiet --allow-existing --python '>=3.12' $(CLIENTS)/inference-perf; then \
	  $(UV) pip install --quiet --python $(CLIENTS)/inference-perf -r tests/clients/inference-perf.txt; \
	else echo "no Python 3.12: inference-perf is left out"; fi
	@mkdir -p $(CLIENTS)/npm && cp tests/clients/package.json $(CLIENTS)/npm/
	@npm install --prefix $(CLIENTS)/npm --no-audit --no-fund --ignore-scripts --silent
	@touch $@

clients: $(CLIENTS)/.made
	$(BIN)/python -m pytest -m clients $(ARGS) tests/clients

# Tables made from the code first, then the pages.
docs: $(VENV)/.dev
	$(BIN)/python -m model.reference
	$(MANUAL)

pictures: $(VENV)/.dev
	PICTURES=docs $(BIN)/python -m pytest tests/demo/test_pictures.py

notebooks: NOTEBOOKS = $(or $(ONLY:%=notebooks/%*.ipynb),notebooks/*.ipynb)
notebooks: $(VENV)/.dev
	$(BIN)/jupyter execute --inplace --timeout=1800 $(NOTEBOOKS)
	$(BIN)/python -m experiments.notebook.stored $(NOTEBOOKS)

# The checks beside each other, and the tests only if they pass, also under `make -j`.
test: $(VENV)/.dev
	@$(MAKE) --no-print-directory -j 2 lint types
	@$(MAKE) --no-print-directory pytest ARGS="$(PARALLEL) $(ARGS)"

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .gradio .cache site build dist *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
