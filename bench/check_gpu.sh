#!/usr/bin/env bash
# Ten minutes on a machine with a CUDA GPU, used fully: build, tests, sanitizers, benchmarks.
#
#   bash bench/check_gpu.sh --output build/check_gpu          # at most 540 s; --seconds N for another limit
#   bash bench/check_gpu.sh --output build/check_gpu --data DIR   # the epochs on HAM10000, not synthetic
#   bash bench/check_gpu.sh --output build/check_gpu --rehearse   # the same script on the CPU, tiny
#
# Leaves check_gpu.json, check_gpu.md and a log of every stage, written as they come. Needs no network;
# PYTHON names the interpreter. Exit code: 0 all that can run here passed, 1 something failed, 2 no GPU
# here, 3 incomplete: nothing failed, but for some stage there was not time enough.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu/check.py "$@"
