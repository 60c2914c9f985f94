# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment (EMO_JAX_VENV, default .venv) with this checkout, the extras
# named in $1 (EMO_JAX_EXTRAS: those instead) and the requirement $2, if any, installed, and puts it on the PATH. A second call
# with nothing changed installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${EMO_JAX_EXTRAS:-${1:-}} requirement=${2:-${EMO_JAX_EXTRAS:+${EMO_JAX_TORCH:-}}}
venv=${EMO_JAX_VENV:-.venv}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "emo_jax needs Python 3.11 or later; $python is $("$python" -V 2>&1). Set PYTHON=/path/to/python3." >&2
  exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
stamp="$venv/installed-$extras"
if ! [ "$stamp" -nt setup.py ]; then
  echo "installing emo_jax${extras:+ with extras $extras} into $venv (about 1 GB, several with test-clients; minutes on a slow line)" >&2
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet --editable ".${extras:+[$extras]}" ${requirement:+"$requirement"}
  touch "$stamp"
fi
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH
# Huge pages for the buffers of a step: measured 1.26 times the tokens a second of emo_tiny on a CPU (glibc 2.35 or later).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
