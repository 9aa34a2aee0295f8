#!/bin/sh
# A tiny model with a calculator: warm start with calls in the traces, then GRPO without the tool, with it, and with a
# price for each call; three seeds each. About an hour on two CPU cores. docs/tools.md has the results.
#     sh recipes/calculator_tiny.sh            # or STEPS=2 TOKENS=20000 SEEDS=1 PROBLEMS=8 to try it
set -eu
cd "$(dirname "$0")/.."
STEPS=${STEPS:-75} TOKENS=${TOKENS:-12000000} SEEDS=${SEEDS:-1 2 3} PROBLEMS=${PROBLEMS:-512} OUT=${OUT:-runs/calculator}
QUESTIONS="--num-terms 3 --num-digits 2"

python warm_start.py --task calculator $QUESTIONS --tokens "$TOKENS" --eval-problems "$PROBLEMS" --out "$OUT/start"
for seed in $SEEDS; do
    for run in "without --task arithmetic" "with --task calculator" "priced --task calculator --call-price 0.05"; do
        set -- $run
        name=$1
        shift
        python train.py --config configs/countdown-tiny.yaml --no-curriculum --ckpt "$OUT/start" "$@" $QUESTIONS \
            --arithmetic-weight 0 --max-new-tokens 256 --steps "$STEPS" --eval-problems "$PROBLEMS" --seed "$seed" \
            --run-dir "$OUT/$name-$seed"
    done
done
