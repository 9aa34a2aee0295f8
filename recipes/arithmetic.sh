#!/usr/bin/env bash
# Arithmetic without worked examples, a released 0.5B model: docs/experiments-appendix.md.
# Needs the checkpoint Qwen2.5-Coder-0.5B-Instruct. Writes docs/results/arithmetic-qwen2.5-coder-0.5b.png and its raw files.
. "$(dirname "$0")/common.sh"
SEEDS="${SEEDS/0 1 2/0}"
cost "27 minutes of steps per seed on one thread"

folders=()
for seed in $SEEDS; do
    train "runs/arithmetic-$seed" 50 --ckpt Qwen2.5-Coder-0.5B-Instruct --num-terms 2 3 3 --num-digits 1 2 2 \
        --prompts-per-step 4 --group-size 8 --max-new-tokens 200 --micro-batch-tokens 1024 --lr 4e-6 \
        --advantage-scale none --warmup-steps 5 --eval-problems 128 --eval-every 0 --no-curriculum --seed "$seed"
    folders+=("runs/arithmetic-$seed")
done
run "$PYTHON" docs/figures.py arithmetic-qwen2.5-coder-0.5b "${folders[@]}" --problems 128
