#!/usr/bin/env bash
# Sets up an environment, trains the tiny EMO and its matched standard MoE on the text of the Python installation, and shows
# what the experts of each are worth: bash launch/quickstart.sh [--out DIR] [--a.b=c ...]
# Your own text: --data.path=FILE_OR_FOLDER (JSON Lines with "text" and "source" fields, or *.txt).
set -euo pipefail
out=runs/quickstart
overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    *) overrides+=("$1"); shift ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
source "$(dirname "$0")/environment.sh" report

# Both models read with one tokenizer, so that their losses compare.
tokenizer=()
[[ " ${overrides[*]} " == *" --data.tokenizer="* ]] || tokenizer=("--data.tokenizer=$out/emo/tokenizer.json")
train_emo() { emo-jax train emo_tiny --out "$out/emo" "${overrides[@]}"; }
train_stdmoe() {
  [ ${#tokenizer[@]} -eq 0 ] || until [ -e "$out/emo/tokenizer.json" ]; do sleep 0.2; done
  emo-jax train stdmoe_tiny --out "$out/stdmoe" "${tokenizer[@]}" "${overrides[@]}"
}
evaluate() { emo-jax eval "$out/emo" --against "$out/stdmoe" --keep 16,8,4 --out "$out/report"; }
analyze() {
  emo-jax analyze "$out/emo" "$out/stdmoe" --tokens 30000 --null-tokens 10000 --removal-tokens 2048 --out "$out/report"
}

# $1 and $2 beside each other on half of the cores each, where there are two: none of them keeps all busy. What $2 says goes to
# the file $3, and is shown if it fails.
beside() {
  local halves
  halves=$(python -c 'import os
cores = [*map(str, sorted(os.sched_getaffinity(0)))]
print(",".join(cores[::2]), ",".join(cores[1::2]))' 2>/dev/null) || halves=
  if ! [[ "$halves" == *" "[0-9]* ]] || ! command -v taskset >/dev/null; then
    "$1"
    "$2"
    return
  fi
  echo "   beside it: $2, which writes to $3" >&2
  set -m  # a process group of its own, so that all of it can be ended
  (taskset -cp "${halves% *}" "$BASHPID" >/dev/null && "$2") >"$3" 2>&1 &
  set +m
  trap 'kill -- -'$!' 2>/dev/null; wait' EXIT
  (taskset -cp "${halves#* }" "$BASHPID" >/dev/null && "$1")
  wait $! || { tail -n 20 "$3" >&2; exit 1; }
  trap - EXIT
}

echo "== 1/2 training the tiny EMO -> $out/emo, and its matched standard MoE -> $out/stdmoe" >&2
beside train_emo train_stdmoe "$out/stdmoe.log"
echo "== 2/2 choosing half, a quarter and an eighth of the experts for every kind of text; looking at what they became" >&2
beside evaluate analyze "$out/analyze.log"
echo "Checkpoints, metrics.jsonl and TensorBoard events: $out/emo, $out/stdmoe. Open the report: file://$out/report/report.html"
