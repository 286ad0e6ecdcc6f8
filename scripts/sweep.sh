#!/usr/bin/env bash
# Step 1 over the paper's grid of models, languages and tasks. Restartable: what is scored already is skipped.
#   bash scripts/sweep.sh [model …]                        all of it, one model after the other
#   sbatch --array=0-47 scripts/sweep.sh [model …]         the same as a Slurm array, one (model, language) a job:
#                                                          0 to 12 * models - 1
# Environment: SWEEP_LANGUAGES and SWEEP_TASKS (lists with spaces), SWEEP_PROCESSES (processes that share a dataset's
# prompts, default 1), SOTERIA_RESULTS (default results).
set -euo pipefail
# Slurm runs a copy of this file that lies elsewhere: submit from the repository's root.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then cd "$SLURM_SUBMIT_DIR"; else cd "$(dirname "$0")/.."; fi
source scripts/environment.sh
trap 'exit 130' INT

models=("$@")
if [ $# -eq 0 ]; then
  models=(meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen2-7B-Instruct mistralai/Mistral-7B-Instruct-v0.3
    microsoft/Phi-3.5-mini-instruct)
fi
read -ra languages <<<"${SWEEP_LANGUAGES:-$(paper_languages)}"
read -ra tasks <<<"${SWEEP_TASKS:-antonym country-capital country-currency sentiment ag_news}"

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  n_cells=$((${#models[@]} * ${#languages[@]}))
  if [ "$SLURM_ARRAY_TASK_ID" -ge "$n_cells" ]; then
    echo "error: array index $SLURM_ARRAY_TASK_ID, but there are $n_cells cells: --array=0-$((n_cells - 1))" >&2
    exit 2
  fi
  models=("${models[SLURM_ARRAY_TASK_ID / ${#languages[@]}]}")
  languages=("${languages[SLURM_ARRAY_TASK_ID % ${#languages[@]}]}")
fi

datasets=()
for language in "${languages[@]}"; do
  for task in "${tasks[@]}"; do datasets+=("${task}_$language"); done
done
launcher=(python)
[ "${SWEEP_PROCESSES:-1}" -gt 1 ] && launcher=(torchrun --standalone --nproc_per_node "$SWEEP_PROCESSES")

failed=()
for model in "${models[@]}"; do
  echo "$model: ${#datasets[@]} datasets"
  # A model that fails does not keep the others from their turn; Ctrl-C ends the sweep.
  "${launcher[@]}" src/compute_indirect_effect.py --model_name "$model" --dataset_name "${datasets[@]}" ||
    failed+=("$model")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: not finished: ${failed[*]}; the same command goes on from here" >&2
  exit 1
fi
