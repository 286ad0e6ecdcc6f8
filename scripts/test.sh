#!/usr/bin/env bash
# Lint, the layers of the library, then every test on all cores; the notebooks are executed for real.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
extras=(requirements-test.txt requirements-utility.txt)
source scripts/environment.sh
ruff check .
ruff format --check .
PYTHONPATH=src lint-imports --no-cache
export OMP_NUM_THREADS=1 # the tests run side by side, one thread each
python -m pytest -n auto --dist worksteal "$@"
