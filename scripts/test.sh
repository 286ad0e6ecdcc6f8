#!/usr/bin/env bash
# Lint, then every test; the notebooks are executed for real.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=(requirements-utility.txt)
source scripts/environment.sh
ruff check .
ruff format --check .
python -m pytest "$@"
