#!/usr/bin/env bash
# The study of emergent modules: trains EMO, the matched standard MoE and the ablations on the same rows from the same
# initial parameters, measures all of them, and writes DIR/study.md and DIR/study.png.
#
#   bash launch/study.sh [--out DIR] [--held-out FILE] [--seeds "0 1 2"] [--ablation-seeds "0"] [--variants "emo stdmoe ..."]
#                        [--jobs N] [--gpu] [--a.b=c ...]
#
# --held-out: labelled documents to measure on (default: those that the runs held out). --data.path: documents to train on
# (default: the text of the Python installation); --data.leave_out_labels=a,b keeps labels from all models. --jobs: models
# at a time (default: 1). --gpu: configs/study_gpu.py instead of configs/study_cpu.py. What is finished is not done again.
set -euo pipefail
out=runs/study held_out= seeds="0 1 2" ablation_seeds=0 variants= jobs=1 base=study_cpu fixed=8
overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --held-out) held_out=$2; shift 2 ;;
    --seeds) seeds=$2; shift 2 ;;
    --ablation-seeds) ablation_seeds=$2; shift 2 ;;
    --variants) variants=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    --gpu) base=study_gpu fixed=16; shift ;;
    --*.*=*) overrides+=("$1"); shift ;;
    *) echo "study.sh: unknown argument $1" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
source "$(dirname "$0")/environment.sh" report

# What makes a variant, on top of the base config (EMO).
fields() {
  case "$1" in
    emo) ;;
    stdmoe) echo --router.document_pool=false ;;                                   # no document pools
    local_balance) echo --router.balance_scope=shard --router.balance_shards=8 ;;  # each eighth of the rows by itself
    fixed_pool) echo "--router.pool_min=$fixed" "--router.pool_max=$fixed" ;;      # a quarter of the experts
    beta_pool) echo --router.pool_distribution=beta ;;                             # Beta(4, 1): mostly large pools
    emo_v2) echo --router.semantics=emo_v2 --router.load_balance_weight=0.01 --router.router_z_weight=1e-5 ;;
    stdmoe_v2) echo "$(fields stdmoe) $(fields emo_v2)" ;;                         # the weights of v2 without pools
    *) echo "study.sh: unknown variant $1" >&2; return 2 ;;
  esac
}

one() {  # VARIANT SEED
  local run="$out/$1/$2" measures=(--methods router --documents 50) variant
  [ -e "$run/measures.json" ] && return
  variant=$(fields "$1")
  case "$1" in emo | stdmoe) measures=(--methods router,layerwise,easy_ep,random --documents 1,5,50) ;; esac
  [ -z "$held_out" ] || measures+=(--data "$held_out")
  echo "== $1, seed $2 -> $run" >&2
  # shellcheck disable=SC2086  # the fields of a variant are words
  emo-jax train "$base" --out "$run" --seed "$2" "--data.tokenizer=$out/tokenizer.json" "${overrides[@]}" $variant \
    >"$run.log" 2>&1 && emo-jax study measure "$run" "${measures[@]}" --out "$run/measures.json" >>"$run.log" 2>&1 || {
    echo "study.sh: $1, seed $2 failed: $run.log" >&2
    return 1
  }
}

list=$(
  for seed in $seeds; do for v in ${variants:-emo stdmoe}; do echo "$v $seed"; done; done
  [ -n "$variants" ] || for seed in $ablation_seeds; do
    for v in local_balance fixed_pool beta_pool emo_v2 stdmoe_v2; do echo "$v $seed"; done
  done
)
while read -r v seed; do
  fields "$v" >/dev/null || exit 2
  mkdir -p "$out/$v"
done <<<"$list"
[ -e "$out/tokenizer.json" ] || emo-jax data inspect "$base" --run "$out" "${overrides[@]}" >&2
export -f one fields
export out base fixed held_out
if [ "$jobs" = 1 ]; then
  while read -r v seed; do one "$v" "$seed" </dev/null; done <<<"$list"
else  # a core each: several models on all cores would wait for one another
  export lines=$(printf '%s\n' "${overrides[@]}")
  echo "$list" | xargs -P "$jobs" -L 1 --process-slot-var=slot bash -c '
    set -euo pipefail
    overrides=()
    while read -r line; do [ -z "$line" ] || overrides+=("$line"); done <<<"$lines"
    ! command -v taskset >/dev/null || taskset -cp "$slot" $$ >/dev/null
    one "$@"' _
fi
emo-jax study report "$out"
