#!/usr/bin/env bash
# Sets up an environment and passes the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
arguments=("$@")
set -- test
source "$(dirname "$0")/environment.sh" test
export JAX_PLATFORMS=cpu
exec python -m pytest -q -n "${EMO_JAX_TEST_PROCESSES:-2}" tests "${arguments[@]}"
