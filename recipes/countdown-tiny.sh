#!/usr/bin/env bash
# The default run, three seeds: the figure and the result of README.md, the first half of docs/experiments.md.
# Writes docs/results/countdown-tiny.png and docs/results/countdown-tiny/seed-N.jsonl.
. "$(dirname "$0")/common.sh"
cost "6 to 15 minutes per seed on one thread"

folders=()
for seed in $SEEDS; do
    train "runs/tiny-$seed" 75 --seed "$seed"
    folders+=("runs/tiny-$seed")
done
run "$PYTHON" docs/figures.py countdown-tiny "${folders[@]}" --problems 512
