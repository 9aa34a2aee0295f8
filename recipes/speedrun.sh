#!/usr/bin/env bash
# The speedrun: seconds of training until the bundled model solves .60 of the held-out problems. docs/speedrun.md has the
# rules. Change the flags of `train` below, or the code. Writes runs/speedrun-N.
THREADS="${THREADS:-2}"
. "$(dirname "$0")/common.sh"
SEEDS="0 1 2"
cost "about 4 minutes of training per seed on two cores, and the evaluation"

folders=()
for seed in $SEEDS; do
    train "runs/speedrun-$seed" 75 --seed "$seed" --eval-problems 0 --save-every 0 --log-samples 0
    folders+=("runs/speedrun-$seed")
done
run "$PYTHON" benchmarks/speedrun.py "${folders[@]}"
