#!/usr/bin/env bash
# A run on TPU VMs, one slice or several, through queued resources of Google Cloud:
#
#   bash launch/tpu.sh VERB NAME [OPTIONS] [train CONFIG ...]
#
# create  asks for the slices: --type v5p-128, --slices N (1), --spot, --runtime VERSION; options of the form --a=b are handed to
#         `gcloud ... create` (--network=..., --service-account=..., --reserved=true)
# start   installs --package (gs://.../emo_jax-*.whl, or git+https://...@COMMIT) on all workers and starts the command there, which
#         again.sh starts again by its exit status
# watch   create and start, and both again after a preemption, until the command is done; looks every --every SECONDS (60)
# status, logs (--all workers, --follow), stop (saves first), delete
#
# Each says so where there is nothing to do. --dry-run prints the commands instead. From the environment: PROJECT, ZONE; BUCKET
# (gs://...) for a command without --out, which then writes to BUCKET/runs/NAME; SSH_FLAGS, such as --internal-ip or
# --tunnel-through-iap.
set -uo pipefail
exec 3>&1
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "tpu.sh: $*" >&2; exit 2; }
say() { echo "tpu.sh: $*" >&2; }

verbs=" create start watch status logs stop delete "
verb=${1:-} name=${2:-}
[ -n "$verb" ] && [[ $verbs == *" $verb "* ]] || fail "VERB '$verb' must be one of:$verbs"
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME '$name' must be a small letter, then small letters, digits and hyphens"
shift 2
type='' slices=1 spot='' runtime='' package='' every=60 all='' follow='' dry_run='' more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --type | --slices | --runtime | --package | --every)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "${1#--}=$2"; shift 2 ;;
    --spot | --all | --follow | --dry-run)
      option=${1#--}
      declare "${option//-/_}=1"; shift ;;
    --*=*) more+=("$1"); shift ;;
    -*) fail "unknown option $1" ;;
    *) break ;;
  esac
done
for variable in PROJECT ZONE; do
  [ -n "${!variable:-}" ] || fail "$variable is not set: export $variable=..., the Google Cloud ${variable,,} of the TPUs"
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices '$slices' must be a number from 1 on"
[[ $every =~ ^[0-9]+$ ]] || fail "--every '$every' must be a number of seconds"

runtime_of() {
  case "$1" in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) return 1 ;;
  esac
}

if [[ " create watch " == *" $verb "* ]]; then
  [ -n "$type" ] || fail "--type is missing: the kind and size of a slice, such as v5p-128"
  runtime=${runtime:-$(runtime_of "$type")} || fail "--runtime is missing: the software version of --type $type is not known here"
fi
if [[ " start watch " == *" $verb "* ]]; then
  [ -n "$package" ] || fail "--package is missing: gs://.../emo_jax-VERSION-py3-none-any.whl, or git+https://...@COMMIT"
  [ $# -gt 0 ] || fail "no command, such as: train emo_1b14b_1t --data.path=gs://.../tokens"
  if [[ " $* " != *" --out"[\ =]* ]]; then
    [[ ${BUCKET:-} == gs://* ]] || fail "BUCKET is not set to gs://...: the command has no --out"
    set -- "$@" --out "$BUCKET/runs/$name"
  fi
fi

run() {
  if [ -n "$dry_run" ]; then
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
  else
    "$@" 3>&-
  fi
}
queued() { run gcloud compute tpus queued-resources "$1" "${@:2}" "--project=$PROJECT" "--zone=$ZONE"; }
workers() {  # a command on all of them, or with --node and --worker on some
  local command where=(--node=all --worker=all --batch-size=all)
  [[ $1 != --node=* ]] || { where=("$1" "$2"); shift 2; }
  printf -v command '%q ' bash tpu_worker.sh "$@"
  [ "$1" != state ] || command+="|| echo state: none "  # a new machine, where that file is not yet
  # shellcheck disable=SC2086  # flags
  queued ssh "$name" "${where[@]}" ${SSH_FLAGS:-} "--command=${command% }"
}

slices_state() {  # '' where there is no such resource; $1: what a dry run takes it for
  local list=(list "--filter=name ~ /$name\$" "--format=value(state.state)")
  [ -z "$dry_run" ] || { queued "${list[@]}" >&3; echo "$1"; return; }
  queued "${list[@]}"
}

create() {
  local nodes=("--node-id=$name")
  (( slices == 1 )) || nodes=("--node-count=$slices" "--node-prefix=$name")
  queued create "$name" "--accelerator-type=$type" "--runtime-version=$runtime" "${nodes[@]}" ${spot:+--spot} "${more[@]}"
}

start() {
  # shellcheck disable=SC2086  # flags
  queued scp "$here/again.sh" "$here/tpu_worker.sh" "$name:" --node=all --worker=all --batch-size=all ${SSH_FLAGS:-} &&
    workers install "$package" && workers start "$@"
}

remove() { queued delete "$name" --force --quiet; }

look() {  # one round of `watch`; ends it where the command has ended
  local state states last
  state=$(slices_state) || { say "gcloud does not answer"; return; }
  case $state in
    '') say "asking for $name"; create; return ;;
    SUSPENDED) say "$name was preempted: deleting it and asking again"; remove && create; return ;;
    FAILED) say "the request for $name failed; why: gcloud compute tpus queued-resources describe $name"; exit 1 ;;
    ACTIVE) ;;
    *) say "$name is $state"; return ;;
  esac
  states=$(workers state | sed -n 's/.*state: //p')
  case $states in
    '') say "the workers of $name do not answer" ;;
    *none*) say "starting the command"; start "$@" ;;
    *running*) ;;
    *)
      last=$(sort -n -k 2 <<< "${states//ended /}" | tail -n 1)
      say "the command has ended with $last; the slices are still there: bash launch/tpu.sh delete $name"
      exit "$last" ;;
  esac
}

case $verb in
  create)
    state=$(slices_state '') || exit 1
    case $state in
      '') create ;;
      FAILED | SUSPEND* | DELETING) say "$name exists and is $state: delete it first"; exit 1 ;;
      *) say "$name exists already and is $state" ;;
    esac ;;
  start)
    state=$(slices_state ACTIVE) || exit 1
    [ "$state" = ACTIVE ] || { say "$name is ${state:-not there}, not ACTIVE"; exit 1; }
    start "$@" ;;
  watch)
    if [ -n "$dry_run" ]; then
      slices_state '' > /dev/null; create; start "$@"; workers state
      exit
    fi
    while :; do look "$@"; sleep "$every"; done ;;
  status)
    queued list "--filter=name ~ /$name\$" || exit 1
    [ "$(slices_state ACTIVE)" != ACTIVE ] || workers state ;;
  logs)
    where=(--node=0 --worker=0)
    [ -z "$all" ] || where=(--node=all --worker=all)
    workers "${where[@]}" logs 50 ${follow:+-F} ;;
  stop) workers stop ;;
  delete)
    state=$(slices_state ACTIVE) || exit 1
    if [ -n "$state" ]; then remove; else say "there is no $name"; fi ;;
esac
