#!/usr/bin/env bash
# Groups of 2 to 16 responses: docs/experiments-appendix.md (two seeds there).
# Writes docs/results/group-size.png and docs/results/group-size.jsonl.
. "$(dirname "$0")/common.sh"
cost "4 runs of 6 to 15 minutes per seed on one thread"

run "$PYTHON" benchmarks/compare.py group-size --seeds $SEEDS --threads "$OMP_NUM_THREADS"
