#!/usr/bin/env bash
# The study of emergent modules: sets up an environment, then `emo-jax study run` with the same arguments.
#
#   bash launch/study.sh [--out DIR] [--held-out FILE] [--seeds "0 1 2"] [--ablation-seeds "0"] [--variants "emo stdmoe ..."]
#                        [--jobs N] [--gpu] [--a.b=c ...]
#
# --data.path: labelled documents to train on (default: the text of the Python installation); --data.leave_out_labels=a,b
# keeps labels from all models. The variants: emo_jax/study/variants.py.
set -euo pipefail
here=$PWD
source "$(dirname "$0")/environment.sh" report
cd "$here"
exec emo-jax study run "$@"
