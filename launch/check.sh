#!/usr/bin/env bash
# Sets up an environment and checks the code without running it: ruff (.ruff.toml) and ty (.ty.toml).
set -euo pipefail
source "$(dirname "$0")/environment.sh" test,check
ruff check .
ty check --config-file .ty.toml --python "$(python -c 'import sys; print(sys.prefix)')"
