#!/bin/sh
# Builds the environment of the contenders openvino-genai and optimum-intel, in the folder given (default: build/peers/genai).
#
#     sh benchmarks/peers/genai.sh
#
# optimum-intel, which converts the model, needs another diffusers than this project. It imports torchvision if that is
# installed, which has no build for PyTorch's CPU wheel and then fails, so it is removed.
# To avoid the CUDA build of PyTorch, set PIP_EXTRA_INDEX_URL to its CPU wheel index (see pytorch.org/get-started).
set -eu
folder=${1:-build/peers/genai}
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check --quiet --requirement "$(dirname "$0")/genai.txt"
"$folder/bin/python" -m pip uninstall --disable-pip-version-check --quiet --yes torchvision
