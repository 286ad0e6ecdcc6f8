#!/usr/bin/env bash
# How the scaling factor of scripts/demo.sh was chosen: the method alone, on the validation questions of all twelve
# languages. Taken is the factor with the lowest mean ASR among those that cost at most 2 points of benign refusals and
# 2 points of in-context accuracy, which leaves a margin to the 5 points that the reported numbers must keep to, and that
# change at most 5 % of the benign answers: beyond it they begin well and end garbled, which is no refusal.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export SOTERIA_RESULTS=${SOTERIA_RESULTS:-results}
base=data/models/polyglot-base
python src/compute_indirect_effect.py --model_name "$base" --dataset_name '*' \
  --save_path_root "$SOTERIA_RESULTS/indirect_effect/polyglot-base"
python src/select_heads.py --results "$SOTERIA_RESULTS/indirect_effect/polyglot-base" --language all \
  --head_folder polyglot-base --heads_root "$SOTERIA_RESULTS/heads"
python src/compare_controls.py --choose --finetune_model data/models/polyglot-tuned --base_model "$base" --language all \
  --head_folder polyglot-base --policy policy-validation --benign everyday-validation \
  --scaling_factor ${@:-3 4 5 6 7 8}
