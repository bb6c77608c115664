PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test coverage lint types docs build style clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# glibc gives large blocks back to the system after each use; keeping them makes training a fifth faster on a CPU.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: export MALLOC_MMAP_MAX_ = 0
demo: export MALLOC_TRIM_THRESHOLD_ = 100000000000
demo: export MALLOC_TOP_PAD_ = 268435456
demo: install
	$(BIN)/maskft demo

test: install
	$(BIN)/python -m pytest

# Slower than `test`; the floor stands in pyproject.toml.
coverage: install
	$(BIN)/python -m pytest --cov --cov-report term:skip-covered

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: install
	$(BIN)/mkdocs build --strict --quiet

build: install
	.ci/wheel

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info
