#!/bin/sh
# Builds the environment of the contenders sdcpp-f16 and sdcpp-q8_0, in the folder given (default: build/peers/sdcpp).
#
#     sh benchmarks/peers/sdcpp.sh
#
# stable-diffusion.cpp is compiled from source for this processor, which needs a C++ compiler and takes minutes; CMake
# comes from PyPI.
set -eu
folder=${1:-build/peers/sdcpp}
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON}" \
    "$folder/bin/python" -m pip install --disable-pip-version-check --quiet --requirement "$(dirname "$0")/sdcpp.txt"
