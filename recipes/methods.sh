#!/usr/bin/env bash
# Every method that is offered under a name (docs/papers.md), on the bundled model.
# Writes docs/results/methods.png and docs/results/methods.jsonl.
. "$(dirname "$0")/common.sh"
cost "14 runs of 40 steps with two updates each per seed, on one thread; not timed yet"

run "$PYTHON" benchmarks/compare.py methods --seeds $SEEDS --threads "$OMP_NUM_THREADS"
