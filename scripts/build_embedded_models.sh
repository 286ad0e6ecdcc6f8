#!/usr/bin/env bash
# Build the embedded pair, data/models/polyglot-base and data/models/polyglot-tuned, from the files under data/.
# About 35 minutes on two CPU cores. A pair of the same making comes out, not the committed bytes: see data/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec python scripts/train_embedded_models.py "$@"
