# make demo, make test: both make their own environment first (.venv), and are quick when it is there.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
TORCH_ARGS ?=
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)",*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types unit clean

help:
	@echo "make demo   replay agent sessions over HTTP, coupled against penstock; table, out/demo.html, out/demo.png"
	@echo "make test   lint, types and every test this machine can run, and what was skipped and why"
	@echo "make lint   ruff;  make types  mypy --strict;  make venv  the environment only;  make clean  remove all of it"

venv: $(VENV)/.installed

# Torch goes first and alone, so that nothing else chooses its build. Where pip's own sources give a CUDA build and there
# is no GPU, TORCH_ARGS takes the pip options that select a CPU build (an index of your choice).
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) is here. Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv
	$(BIN)/penstock bench demo --out $(OUT)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

unit: venv
	@mkdir -p $(OUT)
	$(BIN)/python -m pytest -ra --junit-xml=$(OUT)/tests.xml

# Each part runs even when one before it failed, so that one run shows everything; out/parts.txt says how each ended.
test: venv
	@mkdir -p $(OUT); rm -f $(OUT)/parts.txt $(OUT)/tests.xml; \
	for part in lint types unit; do \
		if $(MAKE) --no-print-directory $$part; then end=passed; else end=failed; fi; \
		echo "$$part $$end" >> $(OUT)/parts.txt; \
	done; \
	if grep failed $(OUT)/parts.txt; then exit 1; fi; \
	echo "make test: all that this machine can check holds; what was skipped, and why, is listed above"

clean:
	rm -rf $(VENV) $(OUT) build .pytest_cache .mypy_cache .ruff_cache .hypothesis penstock.egg-info
	find penstock tests -name __pycache__ -type d -prune -exec rm -rf {} +
