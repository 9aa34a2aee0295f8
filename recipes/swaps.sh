#!/usr/bin/env bash
# Share of a run's gain that a few swapped tokens recover: the figure of docs/sharpening.md.
# Writes docs/results/swaps.json and docs/results/swaps.png.
. "$(dirname "$0")/common.sh"
cost "6 to 15 minutes of training and about 7 minutes of swaps, on one thread"

train "runs/tiny-0" 75 --seed 0
run "$PYTHON" docs/swaps.py --after runs/tiny-0 --problems 512
