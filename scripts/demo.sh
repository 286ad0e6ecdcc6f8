#!/usr/bin/env bash
# The whole method on the embedded pair, in minutes on a CPU:
#   bash scripts/demo.sh        English, Hindi and Bengali
#   bash scripts/demo.sh --all  the paper's twelve languages
# A second call reuses what is done. Everything it writes is under results/ (or $SOTERIA_RESULTS).
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  "") languages=(English Hindi Bengali) ;;
  --all) languages=() ;;
  *) echo "usage: bash scripts/demo.sh [--all]" >&2; exit 2 ;;
esac
source scripts/environment.sh
[ ${#languages[@]} -gt 0 ] || read -ra languages <<<"$(paper_languages)"
export SOTERIA_RESULTS=${SOTERIA_RESULTS:-results}
base=data/models/polyglot-base tuned=data/models/polyglot-tuned heads=polyglot-base
# Chosen on the validation questions by scripts/choose_scaling_factor.sh; no number in the table below uses them.
scaling_factor=5

echo "1. Score every attention head on five in-context tasks per language."
python src/compute_indirect_effect.py --model_name "$base" --dataset_name "${languages[@]/#/*_}" \
  --save_path_root "$SOTERIA_RESULTS/indirect_effect/polyglot-base"

echo "2. Keep the top half of the heads per language."
python src/select_heads.py --results "$SOTERIA_RESULTS/indirect_effect/polyglot-base" --language "${languages[@]}" \
  --head_folder "$heads" --heads_root "$SOTERIA_RESULTS/heads"

echo "3. Subtract the harmful direction on those heads; answer and judge the policy questions."
for language in "${languages[@]}"; do
  bash scripts/run.sh "$tuned" "$base" "$language" "policy_$language" "$scaling_factor" yes 32 "$heads"
done

echo "4. The same for benign questions and in-context accuracy, beside the controls; then the table."
python src/compare_controls.py --finetune_model "$tuned" --base_model "$base" --language "${languages[@]}" \
  --head_folder "$heads" --scaling_factor "$scaling_factor"
python src/make_tables.py --results "$SOTERIA_RESULTS" --language "${languages[@]}" \
  --scaling_factor "$scaling_factor" --name "demo${1:+_all}"
