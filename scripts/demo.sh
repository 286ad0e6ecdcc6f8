#!/usr/bin/env bash
# The whole method beside its controls on the embedded pair, in minutes on a CPU:
#   bash scripts/demo.sh        English, Hindi and Bengali
#   bash scripts/demo.sh --all  the paper's twelve languages
# A second call reuses what is done. Everything it writes is under results/ (or $SOTERIA_RESULTS).
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."

case "$*" in
  "") options=() ;;
  --all) options=(--language all --name demo_all) ;;
  *) echo "usage: bash scripts/demo.sh [--all]" >&2; exit 2 ;;
esac
source scripts/environment.sh
exec python src/reproduce.py configs/demo.yaml ${options[@]+"${options[@]}"}
