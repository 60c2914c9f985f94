#!/usr/bin/env bash
# Sets up an environment and passes the tests: bash launch/test.sh [--fast] [--clients] [--newest] [--engines] [--gpu] [pytest arguments]
#
# --fast: without the tests marked slow. --long (an argument of pytest here): also the tests marked long. --clients: also
# installs stock PyTorch, transformers and lm-evaluation-harness, and runs the tests against them; EMO_JAX_TORCH is the requirement for a torch without CUDA
# where the index serves it with (a file or URL of a wheel, or torch==2.13.0+cpu). --newest: in an environment of its own,
# Python 3.12 or later (PYTHON, default python3.12) and the newest JAX; deprecation warnings are errors, but for those below.
# --engines: tests/test_engines.py alone, exports in vLLM, mlx-lm, llama.cpp and transformers 4.57, each in an environment that
# launch/engines.sh makes in EMO_JAX_ENGINES (default .engines; 8 GB, and half an hour on 2 cores).
# --gpu: tests/test_gpu.py alone, on the GPU of this machine, Python 3.12 or later.
set -euo pipefail
extras=test torch='' arguments=() platform=cpu
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) arguments+=(-m "not slow") ;;
    --clients) extras+=,test-clients torch=${EMO_JAX_TORCH:-} ;;
    --newest)
      extras+=,gpu-attention
      export PYTHON=${PYTHON:-python3.12} EMO_JAX_VENV=${EMO_JAX_VENV:-.venv-newest}
      arguments+=(-W error::DeprecationWarning)
      for message in \
        "The Pallas Triton backend is deprecated" \
        "core.Jaxpr is missing a DebugInfo object"; do  # tokamax's kernels; tokamax's plain form
        arguments+=(-W "ignore:$message:DeprecationWarning")
      done ;;
    --engines)
      export EMO_JAX_ENGINES=${EMO_JAX_ENGINES:-.engines} EMO_JAX_TEST_PROCESSES=0
      arguments+=(tests/test_engines.py)
      bash "$(dirname "$0")/engines.sh" "$EMO_JAX_ENGINES" ;;
    --gpu)
      extras+=,cuda platform=cuda,cpu
      export PYTHON=${PYTHON:-python3.12} EMO_JAX_VENV=${EMO_JAX_VENV:-.venv-gpu} EMO_JAX_TEST_PLATFORM=gpu EMO_JAX_TEST_PROCESSES=0
      arguments+=(tests/test_gpu.py) ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
source "$(dirname "$0")/environment.sh" "$extras" "$torch"
export JAX_PLATFORMS=$platform
export PYTHONDONTWRITEBYTECODE=  # hundreds of processes start here, and each would compile the package anew
exec python -m pytest -q -n "${EMO_JAX_TEST_PROCESSES:-2}" --dist worksteal "${arguments[@]}"
