#!/usr/bin/env bash
# Runs a command and starts it again by its exit status: bash launch/again.sh [OPTIONS] COMMAND...
#
# 0: done. 2 (bad input), 126, 127 (no such command): not again. 1 (failed): again, --failures (3) times in a row at most, where
# a run of an hour begins a new row. 75 and all others (preempted, killed): again, --restarts times at most (default: no limit).
# SIGTERM and SIGINT are handed on to the command as SIGTERM, and it is not started again. Ends with the command's last status.
# --pause SECONDS (10) before it is started again; --record FILE is where the last status is written. EMO_JAX_ATTEMPT tells the
# command how often it has been started before.
set -uo pipefail
failures=3 restarts=-1 pause=10 record=''
while [ $# -gt 0 ]; do
  case "$1" in
    --failures | --restarts | --pause)
      [[ "${2:-}" =~ ^[0-9]+$ ]] || { echo "again.sh: $1 needs a number, not '${2:-}'" >&2; exit 2; }
      declare "${1#--}=$2"; shift 2 ;;
    --record) record=${2:?again.sh: --record needs a file}; shift 2 ;;
    -*) echo "again.sh: unknown option $1; known: --failures, --restarts, --pause, --record, before the command" >&2; exit 2 ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || { echo "again.sh: no command; bash launch/again.sh [OPTIONS] COMMAND..." >&2; exit 2; }

say() { echo "again.sh: $*" >&2; }
stop='' interrupted='' child=''
hand_on() {
  stop=1 interrupted=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap hand_on TERM INT
[ -z "$record" ] || trap 'echo $? > "$record"' EXIT

failed=0 attempt=0
while :; do
  began=$SECONDS
  EMO_JAX_ATTEMPT=$attempt "$@" <&0 &
  child=$!
  [ -z "$stop" ] || kill -TERM "$child" 2>/dev/null  # it came while the command was being started
  interrupted=1
  while [ -n "$interrupted" ]; do  # a signal ends `wait` before the command has ended
    interrupted=''
    wait "$child" 2>/dev/null; status=$?
  done
  child=''
  (( SECONDS - began < 3600 )) || failed=0
  if [ -n "$stop" ]; then
    say "told to stop; the command ended with $status"
    exit "$status"
  fi
  case $status in
    0) exit 0 ;;
    2 | 126 | 127) say "ended with $status: the same command would fail again"; exit "$status" ;;
    1)
      (( failed++ < failures )) || { say "failed (1) $failed times in a row: not started again"; exit 1; }
      say "failed (1); starting it again in $pause s, failure $failed of at most $failures in a row" ;;
    *)
      (( restarts != 0 )) || { say "ended with $status: not started again"; exit "$status"; }
      (( restarts < 0 )) || (( restarts-- ))
      say "ended with $status; starting it again in $pause s" ;;
  esac
  (( ++attempt ))
  sleep "$pause" & child=$!
  [ -z "$stop" ] || kill "$child"
  wait "$child" 2>/dev/null
  child=''
  [ -z "$stop" ] || { say "told to stop; the command is not started again"; exit "$status"; }
done
