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

echo "== 1/4 training the tiny EMO -> $out/emo" >&2
emo-jax train emo_tiny --out "$out/emo" "${overrides[@]}"
echo "== 2/4 training its matched standard MoE -> $out/stdmoe" >&2
# Both models read with one tokenizer, so that their losses compare.
tokenizer=()
[[ " ${overrides[*]} " == *" --data.tokenizer="* ]] || tokenizer=("--data.tokenizer=$out/emo/tokenizer.json")
emo-jax train stdmoe_tiny --out "$out/stdmoe" "${tokenizer[@]}" "${overrides[@]}"
echo "== 3/4 choosing half, a quarter and an eighth of the experts for every kind of text" >&2
emo-jax eval "$out/emo" --against "$out/stdmoe" --keep 16,8,4 --out "$out/report"
echo "== 4/4 looking at what the experts of both became" >&2
emo-jax analyze "$out/emo" "$out/stdmoe" --tokens 30000 --null-tokens 10000 --removal-tokens 2048 --out "$out/report"
echo "Checkpoints, metrics.jsonl and TensorBoard events: $out/emo, $out/stdmoe. Open the report: file://$out/report/report.html"
