#!/usr/bin/env bash
# The price of a false sum: docs/experiments-appendix.md (one seed there).
# Writes docs/results/honesty.png and docs/results/honesty.jsonl.
. "$(dirname "$0")/common.sh"
cost "3 runs of 6 to 15 minutes per seed on one thread; one is shared with group-size.sh"

run "$PYTHON" benchmarks/compare.py honesty --seeds $SEEDS --threads "$OMP_NUM_THREADS"
