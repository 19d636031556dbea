# `make papers` and `make test` need nothing but Python >= 3.10; everything else lives in .venv
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
OUT    ?= papers/runs
GPU_OUT ?= runs/gpu_gate
HERE   := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# pip shows its bars on a terminal and keeps quiet in a log
PIP    := $(BIN)/python -m pip install --disable-pip-version-check $(shell [ -t 2 ] || echo --quiet --quiet)

# kernels run in Triton's interpreter where there is no GPU; it has to be set before triton is imported
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
test test-all quick nb outputs: export TRITON_INTERPRET = 1
endif

.DEFAULT_GOAL := help
.PHONY: help install papers quick nb test house test-cpus test-all test-gpu gpu export clean outputs readme check bench dist hooks

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "segkern needs Python >= 3.10; call make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# a stamp per extra: the second call takes seconds
$(VENV)/.papers: settings.ini setup.py | $(BIN)/python
	@echo "setting up $(VENV): PyTorch, JupyterLab and papermill (2 to 4 minutes, once)"
	@$(PIP) -e ".[papers]"
	@touch $@

$(VENV)/.dev: settings.ini setup.py | $(BIN)/python
	@echo "setting up $(VENV) with the development tools (2 to 4 minutes, once)"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.papers

install: $(VENV)/.dev hooks ## .venv with everything a developer needs, and nbdev's git hooks

hooks: $(VENV)/.dev
	@git rev-parse --git-dir >/dev/null 2>&1 && $(BIN)/nbdev_install_hooks >/dev/null && echo "git hooks installed" || echo "no git checkout: hooks left out"

papers: $(VENV)/.papers ## reproduce every paper at smoke scale and write the report
	@$(BIN)/segkern reproduce --scale smoke --jobs $(JOBS) --out $(OUT)

quick: $(VENV)/.dev ## what a change needs, within two minutes: export, its notebooks, the nearest tests, the rules
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/quick.py $(if $(SINCE),--since $(SINCE))

nb: $(VENV)/.dev ## one notebook as CI runs it: make nb N=30_models.s2fpn
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/run.py --notebooks nbs/$(N).ipynb

house: $(VENV)/.dev ## rooms, arrows, circles, widths, cells: they only get better
	@$(BIN)/python tests/house.py

test: $(VENV)/.dev ## notebooks and tests, at most 15 minutes on 2 cores
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/run.py

test-cpus: $(VENV)/.dev ## a slice of the tests as older processors and other numbers of threads compute it
	@$(BIN)/python tests/cpus.py $(SETTINGS)

test-all: $(VENV)/.dev ## everything: the slow tests and test-cpus too
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/run.py --all

# a GPU machine brings its own PyTorch: no .venv is made, and one that is there is used
gpu: ## on a GPU: are the kernels right there, where are they faster; 8 minutes
	@PYTHONPATH="$(CURDIR)" $(HERE) tests/gpu_gate.py --out "$(GPU_OUT)"; code=$$?; echo "report: $(GPU_OUT)/report.md"; exit $$code

test-gpu: ## the tests of the kernels on a CUDA device, and the others that need one
	@PYTHONPATH="$(CURDIR)" SEGKERN_TEST_DEVICE=cuda $(HERE) -m pytest tests/test_kernels_*.py
	@PYTHONPATH="$(CURDIR)" $(HERE) -m pytest -m gpu --ignore-glob='*test_kernels_*'

export: $(VENV)/.dev ## notebooks -> segkern/
	@$(BIN)/nbdev_export

clean: $(VENV)/.dev ## strip notebook metadata (outputs stay)
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_clean --fname papers

outputs: $(VENV)/.dev ## run the notebooks and keep what they show
	@$(BIN)/python tests/nbtools.py outputs

readme: $(VENV)/.dev ## README.md from nbs/index.ipynb, without quarto
	@$(BIN)/python tests/house.py --tree >/dev/null
	@$(BIN)/python tests/nbtools.py readme

check: export clean readme ## fails where export, cleaning or the README were forgotten
	@git diff --exit-code -- segkern nbs papers README.md

bench: $(VENV)/.papers ## speed of the models on this machine -> data/bench
	@$(BIN)/segkern bench models

dist: $(VENV)/.dev ## wheel and sdist in dist/
	@rm -rf dist build && $(BIN)/python -m build --quiet
