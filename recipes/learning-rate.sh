#!/usr/bin/env bash
# Three learning rates: docs/experiments-appendix.md (two seeds there).
# Writes docs/results/learning-rate.png and docs/results/learning-rate.jsonl.
. "$(dirname "$0")/common.sh"
cost "3 runs of 6 to 15 minutes per seed on one thread; one is shared with group-size.sh"

run "$PYTHON" benchmarks/compare.py learning-rate --seeds $SEEDS --threads "$OMP_NUM_THREADS"
