#!/usr/bin/env bash
# Sums and differences without worked examples, a released 0.5B model: docs/experiments-appendix.md.
# Needs the checkpoint Qwen2.5-Coder-0.5B-Instruct. Writes docs/results/sums-qwen2.5-coder-0.5b.png and its raw files.
. "$(dirname "$0")/common.sh"
SEEDS="${SEEDS/0 1 2/0}"
cost "38 to 58 minutes of steps per seed on one thread"

folders=()
for seed in $SEEDS; do
    train "runs/sums-$seed" 50 --ckpt Qwen2.5-Coder-0.5B-Instruct --num-terms 2 3 3 --num-digits 1 2 2 --operators +- \
        --prompts-per-step 8 --group-size 8 --max-new-tokens 200 --micro-batch-tokens 1024 --lr 3e-6 \
        --advantage-scale none --warmup-steps 5 --format-weight 0.2 --eval-problems 192 --eval-every 10 \
        --no-curriculum --seed "$seed"
    folders+=("runs/sums-$seed")
done
run "$PYTHON" docs/figures.py sums-qwen2.5-coder-0.5b "${folders[@]}" --problems 192
