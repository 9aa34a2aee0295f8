#!/usr/bin/env bash
# Controls: the task's reward, a reward for the form only, a random reward.
# Writes docs/results/controls.png and docs/results/controls.jsonl.
. "$(dirname "$0")/common.sh"
cost "3 runs of 6 to 15 minutes per seed on one thread; not timed as a whole"

run "$PYTHON" benchmarks/compare.py controls --seeds $SEEDS --threads "$OMP_NUM_THREADS"
