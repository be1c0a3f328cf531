# make demo    learn two words from five pictures each, export the miniature, draw the words on other backgrounds and together: one contact sheet
# make test    run the tests, in two processes; what they export is cached in .cache/bundles
# make test-docs   run the code of the README and of the guide
# make test-benchmarks   run the tests of the benchmarks
# make test-plans  run the tests that build TensorRT-RTX plans, which are cached in .cache/plans
# make test-server   run the tests of the server, with OpenAI's and A1111's clients in an environment of their own
# make test-browser  run the tests of the server's page in Chromium (Debian's: apt-get install chromium)
# make test-ray      run the tests of training and of the server on Ray
# make check   lint, format, types, layers, spelling, and the documentation as `make docs` builds it
# make docs    build the documentation as a site, in site/; every broken link is an error
# make bench   measure the miniature and learned words against their targets (other benchmarks: python -m benchmarks.NAME)
# make bench-gpu   run what needs an NVIDIA GPU, in a separate environment; with TensorRT-RTX too: GPU_EXTRAS=cuda,train,dev,tensorrt-rtx
# make clean   delete everything the targets above made, including the environments
#
# Everything runs in .venv, created on first use; only Python 3.11 or newer is required.
# To avoid the CUDA build of PyTorch, pass its CPU wheel index: TORCH_INDEX=<address> (see pytorch.org/get-started).
# Tests of a backend that is not installed are skipped; TEST_EXTRAS lists the extras to install for them.

comma := ,
PYTHON ?= $(firstword $(foreach minor,11 12 13,$(shell command -v python3.$(minor))) python3)
VENV ?= .venv
CLIENTS ?= $(CURDIR)/.venv-clients
TORCH_INDEX ?=
EXTRAS ?= cpu,train,dev
TEST_EXTRAS ?= openvino$(comma)ray$(comma)tensorboard$(if $(filter Linux-x86_64,$(shell uname -s -m | tr ' ' -)),$(comma)tensorrt-rtx)
GPU_EXTRAS ?= cuda,train,dev
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
TEST_INSTALLED := $(INSTALLED)$(if $(TEST_EXTRAS),-$(subst $(comma),-,$(TEST_EXTRAS)))
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help demo test test-docs test-benchmarks test-plans test-server test-browser test-ray check docs bench bench-gpu install-tensorrt measure-gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	$(BIN)/python demo.py

# Two processes, each with one thread: threads of one process that wait for work would take the other's time.
# The compiled files are kept, because tests start many processes.
test test-docs test-benchmarks: export OMP_NUM_THREADS ?= 1
test test-docs test-benchmarks: export PYTHONDONTWRITEBYTECODE =
test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-docs: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m docs --numprocesses=2 $(PYTEST_ARGS)

test-benchmarks: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m benchmarks --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-plans: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m plans $(PYTEST_ARGS)

test-server: $(TEST_INSTALLED) $(CLIENTS)/.installed $(if $(shell command -v npm),$(CLIENTS)/node_modules)
	ONEWORD_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest -m server $(PYTEST_ARGS)

test-browser: $(TEST_INSTALLED)
	if command -v node >/dev/null; then node --test tests/serve/page/*.mjs; fi
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-ray: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m "ray and not slow" $(PYTEST_ARGS)

# The clients that judge the server, unmodified, at pinned versions.
$(CLIENTS)/.installed: tests/serve/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	@touch $@

$(CLIENTS)/node_modules: tests/serve/clients/package.json
	mkdir -p $(CLIENTS)
	cp $< $(CLIENTS)
	cd $(CLIENTS) && npm install --silent --no-audit --no-fund
	@touch $@

check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=src $(BIN)/lint-imports
	git ls-files -z | xargs -0 $(BIN)/codespell

docs: $(INSTALLED)
	$(BIN)/zensical build --strict --clean

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.miniature
	$(BIN)/python -m benchmarks.words

# Only one build of ONNX Runtime can be installed in an environment, so this uses a separate one.
# The tests come last, because one that fails stops make.
GPU := VENV=.venv-gpu EXTRAS=$(GPU_EXTRAS) TEST_EXTRAS=
bench-gpu:
	$(MAKE) install-tensorrt $(GPU)
	$(MAKE) measure-gpu $(GPU)
	$(MAKE) test $(GPU) PYTEST_ARGS="-m gpu -n 0"

# TensorRT's libraries are on NVIDIA's index only, which not every machine reaches.
install-tensorrt: $(INSTALLED)
	@$(PIP) --editable '.[tensorrt]' 2>$(VENV)/tensorrt.log || \
		echo "TensorRT could not be installed ($(VENV)/tensorrt.log): its stages and tests are left out"

measure-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

# Runs again only if the requirements or the extras change.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once; this takes a few minutes"
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

ifneq ($(TEST_EXTRAS),)
$(TEST_INSTALLED): $(INSTALLED)
	@echo "installing what the tests need"
	@$(PIP) --editable '.[$(TEST_EXTRAS)]'
	@touch $@
endif

clean:
	rm -rf $(VENV) .venv-gpu .venv-clients .cache build dist site *.egg-info src/*.egg-info demo-output .coverage \
		.mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
