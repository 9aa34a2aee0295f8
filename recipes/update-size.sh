#!/usr/bin/env bash
# How small may the update be? All weights, LoRA of rank 32, 8 and 1, 13 shared numbers, evolution strategies.
# Writes docs/results/update-size.png and docs/results/update-size.jsonl.
. "$(dirname "$0")/common.sh"
cost "5 runs of 6 to 15 minutes per seed on one thread, and one of evolution strategies; not timed yet"

run "$PYTHON" benchmarks/compare.py update-size --seeds $SEEDS --threads "$OMP_NUM_THREADS"
for seed in $SEEDS; do
    run "$PYTHON" benchmarks/update_size.py tied --seed "$seed"
    run "$PYTHON" benchmarks/update_size.py evolution --seed "$seed"
done
run "$PYTHON" benchmarks/update_size.py report --seeds $SEEDS
