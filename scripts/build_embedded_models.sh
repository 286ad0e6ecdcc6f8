#!/usr/bin/env bash
# Build the embedded pair, data/models/polyglot-base and data/models/polyglot-tuned, from the files under data/.
# About 35 minutes on two CPU cores. --check builds elsewhere and compares with the committed files.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
source scripts/environment.sh
# Libraries choose their sums' order by the processor; with these, every x86 processor that has AVX2 gives the same bytes.
export ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 MKL_DYNAMIC=FALSE ONEDNN_MAX_CPU_ISA=AVX2
exec python scripts/train_embedded_models.py "$@"
