#!/usr/bin/env bash
# Bring the authors' original inputs to data/original/: bash scripts/fetch_original.sh --help
# Needs git and a network, or mirrors. A second call fetches nothing that is there and sound.
set -euo pipefail
started_in=$PWD
cd "$(dirname "$(realpath "$0")")/.."
root=$PWD
source scripts/environment.sh
cd "$started_in"
exec python "$root/src/fetch_original.py" "$@"
