# make demo    learn a word from five pictures, export the miniature, draw the word everywhere, one contact sheet
# make test    the tests
# make check   lint, format, types, layers
# make bench   the miniature and learned words, against their bars (the other benchmarks are python -m benchmarks.NAME)
# make clean   take away what the above made, the environment included
#
# Everything runs in .venv, made on first use; nothing but Python 3.11 or newer has to be there.
# Where a plain `pip install torch` means CUDA, TORCH_INDEX=<address of PyTorch's CPU wheel index> gets the CPU build
# (the address stands on pytorch.org/get-started). EXTRAS=cpu,train,dev,openvino,tensorrt-rtx installs those engines as well, and
# the tests that need them then run.

PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
EXTRAS ?= cpu,train,dev
PYTEST_ARGS ?=

BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help demo test check bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	$(BIN)/python demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED) .typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=.typing $(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.miniature
	$(BIN)/python -m benchmarks.words

# Redone only when the requirements or the extras change.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once; this takes a few minutes"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

# Type checkers do not follow the editable install; a folder of links shows them the packages.
.typing: src/oneword
	@mkdir -p .typing/oneword
	@for part in engines runtime export train; do ln -sfn ../../$$part .typing/oneword/$$part; done
	@for part in src/oneword/*; do ln -sfn ../../$$part .typing/oneword/$$(basename $$part); done
	@touch .typing

clean:
	rm -rf $(VENV) .typing build dist *.egg-info src/*.egg-info demo-output .coverage \
		.mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
