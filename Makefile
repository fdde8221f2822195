# make train   set up the environment if need be, and train on the built-in corpus
# make test    set up the development environment if need be, and run the tests
# make coverage  the same, counting the lines that the tests and all processes that they start run: takes a third longer
# make lint    check style
# make docs    build the documentation as a site, build/site; a link that leads nowhere is an error
# make wheel   build the wheel, below build/wheel

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

# Three of them keep two cores busy; with more, tests wait long for what others hold. Their order is tests/conftest.py's.
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder

.PHONY: train test coverage lint docs wheel clean

train: $(VENV)/.installed
	$(BIN)/minbert train

test: $(VENV)/.installed-dev
	$(PYTEST) $(PYTEST_OPTIONS)

# The processes that tests start have other working directories: paths are absolute.
coverage: $(VENV)/.installed-dev
	mkdir -p build
	COVERAGE_ROOT=$(CURDIR) COVERAGE_FILE=$(CURDIR)/build/coverage COVERAGE_CHILDREN=$(CURDIR)/pyproject.toml \
		$(PYTEST) $(PYTEST_OPTIONS) --cov

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build && ln -sfn .. build/minbert
	MYPYPATH=build $(BIN)/mypy --package minbert.data --package minbert.trainer

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# An earlier build would leave modules that are gone.
wheel: $(VENV)/.installed
	rm -rf build/lib build/wheel
	$(BIN)/pip wheel --no-deps --wheel-dir build/wheel .

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and pinned: other packages would take the newest build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@
