# make train   set up the environment if need be, and train on the built-in corpus
# make test    set up the development environment if need be, and run the tests
# make lint    check style

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: train test lint clean

train: $(VENV)/.installed
	$(BIN)/minbert train

test: $(VENV)/.installed-dev
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build && ln -sfn .. build/minbert
	MYPYPATH=build $(BIN)/mypy --package minbert.data --package minbert.trainer

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
