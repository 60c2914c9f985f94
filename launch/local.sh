#!/usr/bin/env bash
# A run of several processes on this machine, each with fake CPU devices: the code path of several hosts, and of several slices.
#
#   bash launch/local.sh [--processes N] [--devices M] [--slices S] [--kill-one SECONDS] [--dry-run] train CONFIG --out DIR ...
#
# N (2) processes with M (4) devices each, which count as S (1) TPU slices. Every line that one prints begins with its number.
# When they end with 75, or one is killed, all are started again (again.sh). --kill-one: so many seconds after the first logged
# step the last process is killed, once, so that one can watch. SIGTERM and Ctrl-C stop all, saved.
set -uo pipefail
given=("$@")
processes=2 devices=4 slices=1 kill_one='' dry_run=''
while [ $# -gt 0 ]; do
  case "$1" in
    --processes | --devices | --slices | --kill-one)
      [[ "${2:-}" =~ ^[0-9]+$ ]] || { echo "local.sh: $1 needs a number, not '${2:-}'" >&2; exit 2; }
      name=${1#--}
      declare "${name//-/_}=$2"; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -*) echo "local.sh: unknown option $1; known: --processes, --devices, --slices, --kill-one, --dry-run, before the command" >&2
        exit 2 ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || { echo "local.sh: no command, such as: train emo_tiny --out runs/tiny" >&2; exit 2; }
(( processes > 0 && devices > 0 && slices > 0 && processes * devices % slices == 0 )) || {
  echo "local.sh: --slices $slices must divide --processes $processes times --devices $devices, none of which may be 0" >&2
  exit 2
}
out=''
[[ " $* " =~ \ --out[\ =]([^\ ]+) ]] && out=${BASH_REMATCH[1]}
[ -z "$kill_one" ] || [ -n "$out" ] || { echo "local.sh: --kill-one needs an --out, where it sees that steps are made" >&2; exit 2; }

environment=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  EMO_JAX_SLICES="$slices" EMO_JAX_NUM_PROCESSES="$processes")
if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    printf -v line '%q ' env "${environment[@]}" EMO_JAX_COORDINATOR=localhost:PORT EMO_JAX_PROCESS_ID="$i" emo-jax "$@"
    echo "${line% }"
  done
  exit
fi
command -v emo-jax > /dev/null || { echo "local.sh: there is no emo-jax on the PATH: pip install -e ." >&2; exit 2; }
[ -n "${EMO_JAX_ATTEMPT:-}" ] || exec bash "$(dirname "$0")/again.sh" --pause 1 bash "$0" "${given[@]}"

# One attempt. Job control gives every process a group of its own, which ends with it: no data worker is left behind.
set -m
pids=() readers=() interrupted='' stop='' killer=''
tell() {
  stop=1 interrupted=1
  kill -TERM "${pids[@]}" 2>/dev/null
}
leave_nothing() { for pid in "${pids[@]}" $killer; do kill -KILL -- "-$pid" 2>/dev/null; done; }
trap tell TERM INT
trap leave_nothing EXIT
prefixed() { while IFS= read -r line; do printf '[%s] %s\n' "$1" "$line"; done; }

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') || exit 1
export "${environment[@]}" EMO_JAX_COORDINATOR="localhost:$port"
for ((i = 0; i < processes; i++)); do
  exec {to}> >(prefixed "$i")
  readers+=($!)
  EMO_JAX_PROCESS_ID=$i emo-jax "$@" >&"$to" 2>&1 {to}>&- </dev/null &
  pids+=($!)
  exec {to}>&-
done
[ -z "$stop" ] || tell  # it came before all were there

kill_last() {  # $1: the folder of the run
  until [ -s "$1/metrics.jsonl" ]; do sleep 0.2; done
  sleep "$kill_one"
  echo "local.sh: killing process $((processes - 1)) with SIGKILL" >&2
  kill -KILL -- "-${pids[-1]}"
}
if [ -n "$kill_one" ] && [ "$EMO_JAX_ATTEMPT" = 0 ]; then
  kill_last "$out" &
  killer=$!
fi

result=0
for pid in "${pids[@]}"; do
  interrupted=1
  while [ -n "$interrupted" ]; do interrupted=''; wait "$pid" 2>/dev/null; status=$?; done
  case $status in
    0) ;;
    2) result=2 ;;
    1) [ "$result" = 2 ] || result=1 ;;
    *) [ "$result" != 0 ] || result=75 ;;
  esac
done
leave_nothing
wait "${readers[@]}" 2>/dev/null
exit "$result"
