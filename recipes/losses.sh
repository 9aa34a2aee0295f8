#!/usr/bin/env bash
# Six policy losses: docs/experiments-appendix.md.
# Writes docs/results/losses.png and docs/results/losses.jsonl.
. "$(dirname "$0")/common.sh"
cost "18 runs of 40 steps with two updates each, on one thread; not timed as a whole"

run "$PYTHON" benchmarks/compare.py losses --seeds $SEEDS --threads "$OMP_NUM_THREADS"
