#!/usr/bin/env bash
# Division of the advantages: docs/experiments-appendix.md (two seeds there).
# Writes docs/results/scaling.png and docs/results/scaling.jsonl.
. "$(dirname "$0")/common.sh"
cost "3 runs of 6 to 15 minutes per seed on one thread; one is shared with group-size.sh"

run "$PYTHON" benchmarks/compare.py scaling --seeds $SEEDS --threads "$OMP_NUM_THREADS"
