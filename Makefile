# Every target installs what it needs into .venv first; see tools/install.sh.
PROFILE ?= tiny
RUN ?= runs/walkthrough
BIN := .venv/bin

.PHONY: help walkthrough test test-slow lint format lab notebooks clean
.DEFAULT_GOAL := help

help:
	@echo "make walkthrough  run every chapter ($(PROFILE)) into $(RUN), with an HTML report"
	@echo "make test         the fast tests"
	@echo "make test-slow    the others: full-size models, killed and resumed runs"
	@echo "make lint         ruff, and that the notebooks' outputs belong to their source"
	@echo "make format       let ruff format the Python files"
	@echo "make lab          open JupyterLab on the notebooks"
	@echo "make notebooks    put the outputs of the run in $(RUN) into notebooks/"
	@echo "make clean        remove .venv and the caches (not the runs)"

.venv/.installed: pyproject.toml constraints.txt tools/install.sh
	@bash tools/install.sh

walkthrough: .venv/.installed
	$(BIN)/qwenlib run all --profile $(PROFILE) --run-dir $(RUN)
	@echo "Report: $(abspath $(RUN))/index.html"

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

test-slow: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check qwenlib tests tools
	$(BIN)/python tools/refresh_notebooks.py --check

format: .venv/.installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format qwenlib tests tools

lab: .venv/.installed
	$(BIN)/jupyter lab --notebook-dir=notebooks

notebooks: walkthrough
	$(BIN)/python tools/refresh_notebooks.py $(RUN)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
