#!/usr/bin/env bash
# Build the embedded pair, data/models/polyglot-base and data/models/polyglot-tuned, from the files under data/.
# About 35 minutes on two CPU cores. The same files come out again on the same kind of processor; on another kind the
# last bits of float arithmetic may differ.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec python scripts/train_embedded_models.py "$@"
