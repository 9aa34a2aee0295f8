#!/usr/bin/env bash
# Arithmetic with worked examples, a released 0.5B model, two seeds: docs/experiments.md and docs/experiments-appendix.md.
# Needs the checkpoint Qwen2.5-Coder-0.5B-Instruct: a folder under models/, or the network.
# Writes docs/results/digits-qwen2.5-coder-0.5b.png and docs/results/digits-qwen2.5-coder-0.5b/seed-N.jsonl.
. "$(dirname "$0")/common.sh"
SEEDS="${SEEDS/0 1 2/0 1}"
cost "7 minutes of worked examples, then about 35 minutes of steps per seed, on two cores"

make models/digits/config.json "$PYTHON" warm_start.py --ckpt Qwen2.5-Coder-0.5B-Instruct --out models/digits --task arithmetic \
    --num-terms 2 3 3 --num-digits 1 2 2 --tokens 60000 --batch-tokens 800 --lr 1e-5 --room 256 --dtype bf16 --threads 2
folders=()
for seed in $SEEDS; do
    train "runs/digits-$seed" 30 --ckpt models/digits --config configs/cpu.yaml --num-terms 2 3 3 --num-digits 1 2 2 \
        --prompts-per-step 8 --group-size 8 --max-new-tokens 256 --micro-batch-tokens 1200 --lr 3e-6 \
        --lr-schedule cosine --advantage-scale none --warmup-steps 3 --format-weight 0.2 --eval-problems 192 \
        --eval-every 10 --seed "$seed" --no-curriculum
    folders+=("runs/digits-$seed")
done
run "$PYTHON" docs/figures.py digits-qwen2.5-coder-0.5b "${folders[@]}" --problems 192
run "$PYTHON" docs/workings.py docs/results/digits-qwen2.5-coder-0.5b/seed-0-answers.jsonl
