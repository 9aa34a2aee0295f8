#!/usr/bin/env bash
# Countdown with searches in order, a released 0.5B model, two runs: docs/cold-start.md and docs/experiments-appendix.md.
# Needs the checkpoint Qwen2.5-Coder-0.5B-Instruct: a folder under models/, or the network.
# Writes docs/results/countdown-in-order-qwen2.5-coder-0.5b.png and its folder of raw files.
. "$(dirname "$0")/common.sh"
cost "21 minutes of worked examples, then 35 and 42 minutes of steps, on two cores"

make models/cold/config.json "$PYTHON" warm_start.py --ckpt Qwen2.5-Coder-0.5B-Instruct --out models/cold --numbers 3 --max-number 20 \
    --orderly --traces-per-problem 8 --room 170 --tokens 120000 --batch-tokens 1000 --lr 2e-5 --dtype bf16 --threads 2 \
    --eval-problems 128
common=(--ckpt models/cold --config configs/cpu.yaml --task countdown --numbers 3 --max-number 20 --prompts-per-step 6
    --group-size 8 --micro-batch-tokens 1000 --lr 4e-6 --lr-schedule cosine --advantage-scale none --warmup-steps 3
    --eval-problems 128 --no-curriculum)
train runs/countdown-180 30 "${common[@]}" --max-new-tokens 180 --eval-every 10
train runs/countdown-300 24 "${common[@]}" --max-new-tokens 300 --eval-every 8 --seed 1
run "$PYTHON" docs/figures.py countdown-in-order-qwen2.5-coder-0.5b runs/countdown-180 runs/countdown-300 --problems 128
run "$PYTHON" docs/searches.py docs/results/countdown-in-order-qwen2.5-coder-0.5b/seed-0-answers.jsonl --every 5
run "$PYTHON" docs/searches.py docs/results/countdown-in-order-qwen2.5-coder-0.5b/seed-1-answers.jsonl --every 4
