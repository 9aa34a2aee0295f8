#!/usr/bin/env bash
# A released 0.5B model with a calculator: without the tool, with it, and with a price for each call. docs/tools.md.
# Needs the checkpoint Qwen2.5-0.5B-Instruct and a GPU.
. "$(dirname "$0")/common.sh"
cost "not timed: three runs of 100 steps per seed"

# calculator NAME FLAGS...: one run for each seed
calculator() {
    local name="$1"
    shift
    for seed in $SEEDS; do
        train "runs/calculator-0.5b-$name-$seed" 100 --config configs/qwen2.5-0.5b.yaml --no-curriculum "$@" \
            --ckpt Qwen2.5-0.5B-Instruct --num-terms 3 --num-digits 2 --max-new-tokens 512 --seed "$seed"
    done
}

calculator without --task arithmetic
calculator with --task calculator
calculator priced --task calculator --call-price 0.05
