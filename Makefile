# Every target sets up .venv by itself when it is missing or when what it was made from changed.
# Nothing needs activating. Works with GNU make 3.81 (macOS) and a POSIX shell.

PYTHON ?= python3
PROFILE ?= quick
CHAPTER ?=
PARAMS ?=
JOBS ?=
BACKEND ?=
SCHEDULER ?=
PORT ?= 8000
FILE ?=
RUNS ?= 2
MODELS ?=
PRETRAINED ?= yes

VENV := .venv
PY := $(VENV)/bin/python
# What .venv was made from: compared by content, not by time, so that a fresh checkout of the same
# requirements needs no network. The folder is part of it: a moved checkout must be installed again.
MADE_FROM := $(VENV)/made-from.txt
INPUTS := { echo "$(CURDIR)"; cat requirements.txt pyproject.toml; }

# In the environment, not on command lines: whatever a reader types into them arrives unquoted.
export PROFILE CHAPTER PARAMS JOBS BACKEND SCHEDULER FILE RUNS MODELS PRETRAINED
# Where the runs of a chapter happen. RAY_ADDRESS, where it is set, is read by Ray itself.
SPREAD := --jobs "$$JOBS" --backend "$$BACKEND" --scheduler "$$SCHEDULER"
# One thread a process: two cores are slower with more (measured), and sums keep their order.
export OMP_NUM_THREADS ?= 1
# Recipes `exec` what takes long: a SIGTERM to make then reaches it, not only the shell around it.

.DEFAULT_GOAL := help
.PHONY: help setup book chapter evidence repeat test bench serve models lint clean provenance

help: ## this list
	@echo "make TARGET [CHAPTER=…] [PROFILE=quick|standard|gpu|cluster] [PARAMS=\"a=1 b=two\"]"
	@echo "            [JOBS=auto|N] [BACKEND=local|dask|ray] [SCHEDULER=tcp://…, of Dask]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

book: setup ## execute what changed, render everything: build/html/index.html
	@exec $(PY) -m lib.pipeline book --profile "$$PROFILE" --params "$$PARAMS" $(SPREAD)

chapter: setup ## one chapter: CHAPTER=one-layer-limits PROFILE=standard PARAMS="device=cpu"
	@exec $(PY) -m lib.pipeline chapter "$$CHAPTER" --profile "$$PROFILE" --params "$$PARAMS" $(SPREAD)

evidence: setup ## record the standard evidence of one CHAPTER or of all; stop and continue at will
	@test "$$PROFILE" = quick || test "$$PROFILE" = standard || { \
	  echo "evidence records the standard profile; for another: make chapter CHAPTER=… PROFILE=$$PROFILE" >&2; exit 2; }
	@exec $(PY) -m lib.pipeline evidence "$$CHAPTER" --params "$$PARAMS" $(SPREAD)

repeat: setup ## repeat RUNS=2 runs of each experiment recorded by older code, of one CHAPTER or of all; compare
	@exec $(PY) -m lib.evidence repeat "$${CHAPTER:-all}" --runs "$$RUNS"

test: setup ## every test: library, doctests, chapters (nbmake), the rendered book in a browser
	@$(PY) -c "import distributed" 2>/dev/null || \
	  $(PY) -m pip install --disable-pip-version-check -q -c requirements-cluster.txt distributed
	$(PY) -m pytest --doctest-modules --nbmake --nbmake-timeout=600 --durations=8 -q tests lib book

bench: setup ## the speed table: ours against baselines in the same run
	$(PY) tests/bench.py

provenance: setup ## which run drew a figure: FILE=build/figures/…/name.svg
	@test -n "$$FILE" || { echo "Which figure? make provenance FILE=build/figures/one-layer-limits/NAME.svg" >&2; exit 2; }
	@$(PY) -m lib.evidence figure "$$FILE"

serve: book ## build, then read at http://localhost:8000 (PORT=8000)
	@echo "http://localhost:$(PORT)/  (Ctrl-C stops)"
	@$(PY) -m http.server --bind 127.0.0.1 --directory build/html $(PORT)

models: setup ## fetch the pretrained model: 93 MB, then 0.6 GB in ~/.cache (PROOF_AND_PROBE_CACHE); MODELS=org/name
	@exec $(PY) -m lib.models.pretrained $$MODELS

lint: setup ## check style: names, imports, layout
	$(PY) -m ruff check .

clean: ## remove what was generated, executed chapters included; .venv and data/evidence stay
	rm -rf build .pytest_cache .ruff_cache .hypothesis

setup:
	@$(INPUTS) | cmp -s - $(MADE_FROM) && $(PY) -c "" 2>/dev/null || $(MAKE) --no-print-directory install

.PHONY: install
install:
	@"$(PYTHON)" -c "" >/dev/null 2>&1 || { \
	  echo "No '$(PYTHON)' on the path: install Python 3.11 or later, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); this book needs Python 3.11 or later: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV): once, about 2.1 GB and 2 to 6 minutes."
	@rm -f $(MADE_FROM)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@$(INPUTS) > $(MADE_FROM)
# Tried once, and missed by nothing but the pages that use it: without it they say so. PRETRAINED=no skips it.
	@test "$$PRETRAINED" = no || { \
	  echo "Fetching the pretrained model: 93 MB, then 0.6 GB outside this folder. make PRETRAINED=no goes without."; \
	  $(PY) -m lib.models.pretrained; } || \
	  echo "The book goes on without the pretrained model, and its pages say so. Later: make models" >&2
