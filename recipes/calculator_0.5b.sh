#!/bin/sh
# Qwen2.5-0.5B-Instruct with a calculator: without the tool, with it, and with a price for each call; three seeds each.
# One GPU, about an hour for each run. docs/tools.md has the results.
#     sh recipes/calculator_0.5b.sh            # or STEPS=2 SEEDS=1 PROBLEMS=8 to try it
set -eu
cd "$(dirname "$0")/.."
CKPT=${CKPT:-Qwen2.5-0.5B-Instruct} STEPS=${STEPS:-100} SEEDS=${SEEDS:-1 2 3} PROBLEMS=${PROBLEMS:-512}
OUT=${OUT:-runs/calculator-0.5b}

for seed in $SEEDS; do
    for run in "without --task arithmetic" "with --task calculator" "priced --task calculator --call-price 0.05"; do
        set -- $run
        name=$1
        shift
        python train.py --config configs/qwen2.5-0.5b.yaml --no-curriculum --ckpt "$CKPT" "$@" --num-terms 3 \
            --num-digits 2 --max-new-tokens 512 --steps "$STEPS" --eval-problems "$PROBLEMS" --seed "$seed" \
            --run-dir "$OUT/$name-$seed"
    done
done
