#!/usr/bin/env bash
# A tiny model with a calculator: its own warm start with calls in the traces, then GRPO without the tool, with it, and
# with a price for each call. docs/tools.md.
. "$(dirname "$0")/common.sh"
cost "not timed: a warm start and three runs of 75 steps per seed, on one thread"

START=models/calculator-tiny
QUESTIONS="--num-terms 3 --num-digits 2"
make "$START/model.safetensors" "$PYTHON" warm_start.py --task calculator $QUESTIONS --tokens 6000000 --out "$START"

# calculator NAME FLAGS...: one run for each seed
calculator() {
    local name="$1"
    shift
    for seed in $SEEDS; do
        train "runs/calculator-$name-$seed" 75 --config configs/countdown-tiny.yaml --no-curriculum --ckpt "$START" "$@" \
            $QUESTIONS --arithmetic-weight 0 --max-new-tokens 256 --seed "$seed"
    done
}

calculator without --task arithmetic
calculator with --task calculator
calculator priced --task calculator --call-price 0.05
