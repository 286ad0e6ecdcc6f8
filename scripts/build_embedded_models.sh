#!/usr/bin/env bash
# Build the embedded pair, data/models/polyglot-base and data/models/polyglot-tuned, from the files under data/.
# About 35 minutes on two CPU cores. --check builds elsewhere and compares with the committed files, which come out again on
# the same kind of processor.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec python scripts/train_embedded_models.py "$@"
