#!/usr/bin/env bash
# What launch/tpu.sh runs on every worker of a slice, where it has copied this file and again.sh into the home folder:
#   bash tpu_worker.sh install PACKAGE | start COMMAND... | state | logs [LINES] [-F] | stop
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=$HOME/emo_jax
mkdir -p "$home"
say() { echo "worker $(hostname): $*"; }

install_package() {  # a wheel in a bucket, or anything that pip takes after "emo-jax @"
  local requirement="emo-jax[tpu,gcs] @ $1" what=$1
  if running; then say "runs: nothing is installed under it"; return; fi
  if [[ $1 == gs://* ]]; then
    gcloud storage cp "$1" "$home/" || return 1
    requirement="$home/${1##*/}[tpu,gcs]"
    what=$(sha256sum "$home/${1##*/}")
  fi
  [ "$(cat "$home/installed" 2>/dev/null)" != "$what" ] || { say "$1 is installed already"; return 0; }
  # The images' own Python is older than 3.11.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv || return 1
  [ -x "$home/venv/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$home/venv" || return 1
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" --reinstall-package emo-jax "$requirement" || return 1
  echo "$what" > "$home/installed"
  say "installed $1"
}

running() {
  local pid
  pid=$(cat "$home/pid" 2>/dev/null) && grep -q again.sh "/proc/$pid/cmdline" 2>/dev/null
}

state() {
  if running; then echo running
  elif [ -s "$home/status" ]; then echo "ended $(cat "$home/status")"
  else echo none  # never started, or the machine was restarted
  fi
}

metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# On TPU VMs no variable names the processes of a run; the metadata server of the machine does.
join() {
  local endpoints index megascale slices slice coordinator hosts
  endpoints=$(metadata worker-network-endpoints) index=$(metadata agent-worker-number)
  if [ -z "$endpoints" ] || [ -z "$index" ]; then
    say "the metadata server does not say which worker of which slice this is" >&2
    return 1
  fi
  megascale=$(metadata tpu-env | sed -n "s/^\(MEGASCALE_[A-Z_]*\): *'\(.*\)' *$/\1=\2/p")
  slices=$(sed -n 's/^MEGASCALE_NUM_SLICES=//p' <<< "$megascale")
  slice=$(sed -n 's/^MEGASCALE_SLICE_ID=//p' <<< "$megascale")
  coordinator=$(sed -n 's/^MEGASCALE_COORDINATOR_ADDRESS=\([^:]*\).*/\1/p' <<< "$megascale")
  IFS=, read -ra hosts <<< "$endpoints"
  export EMO_JAX_NUM_PROCESSES=$(( ${#hosts[@]} * ${slices:-1} ))
  export EMO_JAX_PROCESS_ID=$(( ${slice:-0} * ${#hosts[@]} + index ))
  export EMO_JAX_COORDINATOR=${coordinator:-${hosts[0]##*:}}:8482  # a host is ADDRESS, or NAME:ID:ADDRESS
}

start() {
  if running; then say "$(state) already"; return; fi
  [ -x "$home/venv/bin/emo-jax" ] || { say "emo-jax is not installed here" >&2; return 1; }
  join || return 1
  rm -f "$home/status"
  echo "== $(date -u +%FT%TZ) process $EMO_JAX_PROCESS_ID of $EMO_JAX_NUM_PROCESSES: emo-jax $*" >> "$home/log"
  # By its text: the file may be copied here again while it runs.
  setsid bash -c "$(cat "$here/again.sh")" again.sh --record "$home/status" "$home/venv/bin/emo-jax" "$@" </dev/null >> "$home/log" 2>&1 &
  echo $! > "$home/pid"
  say "started process $EMO_JAX_PROCESS_ID of $EMO_JAX_NUM_PROCESSES"
}

stop() {
  if running; then
    kill -TERM "$(cat "$home/pid")"
    say "told to stop; it saves first"
  else
    say "does not run: $(state)"
  fi
}

case "${1:-}" in
  install) install_package "$2" ;;
  start) shift; start "$@" ;;
  state) say "state: $(state)" ;;
  logs) tail -n "${2:-50}" ${3:+"$3"} "$home/log" ;;
  stop) stop ;;
  *) echo "tpu_worker.sh: install PACKAGE, start COMMAND..., state, logs [LINES] [-F] or stop" >&2; exit 2 ;;
esac
