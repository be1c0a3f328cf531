# make demo    learn a word from five pictures, export the miniature, draw the word everywhere, one contact sheet
# make test    the tests
# make test-plans  the tests that build TensorRT-RTX plans, which are kept in .cache/plans
# make check   lint, format, types, layers
# make bench   the miniature and learned words, against their bars (the other benchmarks are python -m benchmarks.NAME)
# make bench-gpu   what needs an NVIDIA GPU, in an environment of its own; GPU_EXTRAS=cuda,train,dev,tensorrt-rtx for the other flavour
# make clean   take away what the above made, the environment included
#
# Everything runs in .venv, made on first use; nothing but Python 3.11 or newer has to be there.
# Where a plain `pip install torch` means CUDA, TORCH_INDEX=<address of PyTorch's CPU wheel index> gets the CPU build
# (the address stands on pytorch.org/get-started). The tests of an engine that is not installed are skipped: TEST_EXTRAS says which are.

comma := ,
PYTHON ?= $(firstword $(foreach minor,11 12 13,$(shell command -v python3.$(minor))) python3)
VENV ?= .venv
TORCH_INDEX ?=
EXTRAS ?= cpu,train,dev
TEST_EXTRAS ?= openvino$(comma)ray$(comma)tensorboard$(if $(filter Linux-x86_64,$(shell uname -s -m | tr ' ' -)),$(comma)tensorrt-rtx)
GPU_EXTRAS ?= cuda,train,dev,tensorrt
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
TEST_INSTALLED := $(INSTALLED)$(if $(TEST_EXTRAS),-$(subst $(comma),-,$(TEST_EXTRAS)))
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help demo test test-plans check bench bench-gpu measure-gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	$(BIN)/python demo.py

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-plans: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m plans $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=src $(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.miniature
	$(BIN)/python -m benchmarks.words

# Only one of ONNX Runtime's builds can be installed, so not in the environment of the rest.
bench-gpu:
	$(MAKE) test measure-gpu VENV=.venv-gpu EXTRAS=$(GPU_EXTRAS) TEST_EXTRAS= PYTEST_ARGS="-m gpu"

measure-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

# Redone only when the requirements or the extras change.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once; this takes a few minutes"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

ifneq ($(TEST_EXTRAS),)
$(TEST_INSTALLED): $(INSTALLED)
	$(PIP) --editable '.[$(TEST_EXTRAS)]'
	@touch $@
endif

clean:
	rm -rf $(VENV) .venv-gpu .cache build dist *.egg-info src/*.egg-info demo-output .coverage \
		.mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
