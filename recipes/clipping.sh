#!/usr/bin/env bash
# Four updates per rollout with and without a clip: docs/experiments-appendix.md (two seeds there).
# Writes docs/results/clipping.png and docs/results/clipping.jsonl.
. "$(dirname "$0")/common.sh"
cost "2 runs of 25 steps with four updates each per seed, on one thread; not timed as a whole"

run "$PYTHON" benchmarks/compare.py clipping --seeds $SEEDS --threads "$OMP_NUM_THREADS"
