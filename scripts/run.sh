#!/usr/bin/env bash
# Step 3: steer a model for one language, let it answer a set of questions, and judge the answers.
set -euo pipefail

if [ $# -ne 8 ]; then
  cat >&2 <<'USAGE'
usage: bash scripts/run.sh {finetune_model} {base_model} {language} {dataset_file} {scaling_factor} {do_base} {batch_size} {head_folder}
  finetune_model  the harmfully tuned model: hub id (id@revision too), folder, .gguf file, or folder of a LoRA adapter
  base_model      the model to make safer: hub id (id@revision too), folder, or .gguf file
  language        name or code: Hindi, hi
  dataset_file    path of a CSV, JSON, JSONL or Parquet file, a name under data/prompts, a hub dataset id, or its folder
  scaling_factor  how much of the task vector to subtract, >= 0
  do_base         yes or no: answer with the base model too
  batch_size      memory to use for answers, as that many of the longest questions take
  head_folder     folder of <Language>_Heads.json: a name under results/heads, or a path
environment:
  SOTERIA_RESULTS        where everything is written (default: results)
  SOTERIA_JUDGE          refusal, openai:<model> or hf:<model>; several with blanks between (default: refusal)
  SOTERIA_JUDGE_PRESET, SOTERIA_JUDGE_FORMAT      how a model is asked as a judge: see judge.py --help
  SOTERIA_BENIGN         harmless questions, to measure what steering costs: a path, a name under data/benign, or none
                         (default: everyday)
  SOTERIA_BORDERLINE     likewise, harmless questions that look harmful (default: borderline)
  SOTERIA_CHAT_TEMPLATE  yes: ask through the tokenizer's chat template
  SOTERIA_MAX_NEW_TOKENS longest answer in tokens, and so the longest time (default: 512)
  SOTERIA_PRESET         release: ask as the original release did (docs/original_release.md)
  SOTERIA_LANGUAGES      a JSON file of more languages
  SOTERIA_SUBSET, SOTERIA_SPLIT, SOTERIA_QUESTION_COLUMN, SOTERIA_WHERE (column=value or column!=value, several with ;
  between them)          which part of the dataset; SOTERIA_BENIGN_SUBSET and so on: of SOTERIA_BENIGN
  SOTERIA_DEBUG          yes: show the traceback of an error, too
  SOTERIA_STRICT         yes: refuse rows without a question instead of leaving them out
example: bash scripts/run.sh data/models/polyglot-tuned data/models/polyglot-base Hindi policy_Hindi 2 yes 32 polyglot-base
USAGE
  exit 2
fi
finetune_model=$1 base_model=$2 language=$3 dataset=$4 scaling_factor=$5 do_base=$6 batch_size=$7 head_folder=$8

src=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")/src
export SOTERIA_RESULTS=${SOTERIA_RESULTS:-$src/../results} PYTHONPATH=$src${PYTHONPATH:+:$PYTHONPATH}
if [ -x "$src/../.venv/bin/python" ]; then python=$src/../.venv/bin/python; else python=python3; fi

stop() { # end the step that runs, which says so; where none does, say it here
  local ended=$? status=0
  trap '' INT TERM
  if [ -n "${!-}" ]; then
    kill "$!" 2>/dev/null || :
    wait "$!" 2>/dev/null || status=$?
    case $status in 127 | -1) ;; *) ended=$status ;; esac # those: it had ended before
  fi
  case $ended in 130 | 143) ;; *) echo "$1; run the same command again to resume" >&2 ;; esac
  exit "$2"
}
trap 'stop interrupted 130' INT
trap 'stop terminated 143' TERM

step() { # in the background, so that a signal to this script alone ends it, too
  "$python" "$src/$1" "${@:2}" &
  wait "$!"
}

# All arguments are checked first; the names of the three results and the options come from the library.
mapfile -d '' -t plan < <(exec "$python" -m soteria.judging.pipeline "$@")
wait "$!" # a refusal ends this script
safe_model=${plan[0]} answers=${plan[1]} evaluated=${plan[2]}
judge=("${plan[@]:4:plan[3]}") answer=("${plan[@]:4+plan[3]}")

# With = a value that begins with a dash is no option.
step steer.py --finetune_model="$finetune_model" --base_model="$base_model" --language="$language" \
  --scaling_factor="$scaling_factor" --head_folder="$head_folder" --output="$safe_model"
answer+=(--dataset="$dataset" --language="$language" --output="$answers" --batch_size="$batch_size")
step generate.py "${answer[@]}" --model="$safe_model" --column "SAFE ANSWER"
if [ "$do_base" = yes ]; then
  step generate.py "${answer[@]}" --model="$base_model" --column "BASE ANSWER"
fi
step judge.py "${judge[@]}" --input="$answers" --output="$evaluated"
