# Everything from a bare Python 3.11 with pip. A second run skips what is installed already.
PYTHON ?= python3.11
# The build of torch to install: pip's default, or for example a CPU-only one by PIP_INDEX_URL or a wheel's path.
TORCH ?= torch==2.14.1

BIN := .venv/bin
INSTALLED := .venv/.installed
PACKAGES := build/packages/lightning_edge

.PHONY: install quickstart test slow lint format packages types docs check

install: $(INSTALLED)

# torch first and by itself: what comes after it takes the build that is there.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH)" setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[all,dev,docs]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/lightning-edge fit --config recipe:quickstart

# Side by side, a file's tests in one process, and no process with more threads than its share. Four at most: each has all
# exporters in memory, 2 GB. In the order of names: that of how many tests there are leaves files of few and long ones last.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=3600

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Neither mypy nor mkdocstrings follows an editable install's import hook: lay the packages out as they install.
packages:
	rm -rf build/packages
	mkdir -p $(PACKAGES)
	ln -s $(CURDIR)/lightning_edge/* $(PACKAGES)/
	ln -s $(CURDIR)/exporters $(PACKAGES)/exporters
	ln -s $(CURDIR)/recipes $(PACKAGES)/recipes

types: $(INSTALLED) packages
	$(BIN)/mypy

docs: $(INSTALLED) packages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint types test docs
