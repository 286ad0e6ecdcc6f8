#!/usr/bin/env bash
# Every table and figure of a grid file, and the report. Restartable: what is done already is skipped.
#   bash scripts/reproduce.sh configs/embedded.yaml           on the embedded pair, in minutes on a CPU
#   bash scripts/reproduce.sh configs/paper.yaml --plan       what the paper's grid would take; starts nothing
#   bash scripts/reproduce.sh configs/paper.yaml --shard 2/8  the second of eight parts, one a GPU or machine
# As a Slurm array each job takes its part by itself. Head lists that languages share need every language's scores:
#   scores=$(sbatch --parsable --array=1-48 scripts/reproduce.sh configs/paper.yaml --steps score)
#   cells=$(sbatch --parsable --array=1-48 --dependency=afterany:$scores scripts/reproduce.sh configs/paper.yaml)
#   sbatch --dependency=afterany:$cells scripts/reproduce.sh configs/paper.yaml --steps tables
# Environment: SOTERIA_PROCESSES (processes, one a GPU, that share each cell, default 1), SOTERIA_RESULTS.
set -euo pipefail
# A grid file may be the user's or the repository's, and lies where it is found first; --results is the user's.
words=() previous=
for word in "$@"; do
  case $word in --results=*) word=${word#*=} previous=--results words+=(--results) ;; esac
  if [[ $previous = --results || ( -f $word && ( ${#words[@]} = 0 || $word = *.y*ml ) ) ]]; then
    case $word in /*) ;; *) word=$PWD/$word ;; esac
  fi
  words+=("$word") previous=$word
done
set -- ${words[@]+"${words[@]}"}
# Slurm runs a copy of this file that lies elsewhere: submit from the repository's root.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
if [ ! -f "$root/src/reproduce.py" ]; then root=${SLURM_SUBMIT_DIR:-$root}; fi
processes=${SOTERIA_PROCESSES:-1}
if [ ! -f "$root/src/reproduce.py" ]; then
  echo "error: $root is not the repository; call or submit scripts/reproduce.sh from the repository's root" >&2
  exit 2
elif [[ ! $processes =~ ^[1-9][0-9]{0,2}$ ]]; then
  echo "error: SOTERIA_PROCESSES must be a whole number from 1 to 999; set it, or leave it out" >&2
  exit 2
fi
cd "$root"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  set -- "$@" --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT"
fi
extras=(requirements-utility.txt) # lm-eval
source scripts/environment.sh
launcher=(python)
[ "$processes" -gt 1 ] && launcher=(torchrun --standalone --nproc_per_node "$processes")
exec "${launcher[@]}" src/reproduce.py "$@"
