#!/usr/bin/env bash
# Countdown with attempts drawn at random, a released 0.5B model: docs/experiments-appendix.md. The published run was
# stopped after 20 of 24 steps. Needs the checkpoint Qwen2.5-Coder-0.5B-Instruct: a folder under models/, or the network.
# Writes docs/results/countdown-qwen2.5-coder-0.5b.png and its folder of raw files.
. "$(dirname "$0")/common.sh"
cost "worked examples (not timed), then 26 minutes for 20 steps, on two cores"

make models/cold-random/config.json "$PYTHON" warm_start.py --ckpt Qwen2.5-Coder-0.5B-Instruct --out models/cold-random --numbers 3 \
    --max-number 20 --traces-per-problem 8 --room 150 --tokens 90000 --batch-tokens 1000 --lr 2e-5 --dtype bf16 \
    --threads 2 --eval-problems 128
train runs/countdown-random 24 --ckpt models/cold-random --config configs/cpu.yaml --task countdown --numbers 3 \
    --max-number 20 --prompts-per-step 6 --group-size 8 --max-new-tokens 160 --micro-batch-tokens 1000 --lr 4e-6 \
    --lr-schedule cosine --advantage-scale none --warmup-steps 3 --eval-problems 128 --eval-every 10 --no-curriculum
run "$PYTHON" docs/figures.py countdown-qwen2.5-coder-0.5b runs/countdown-random --problems 128
run "$PYTHON" docs/searches.py docs/results/countdown-qwen2.5-coder-0.5b/seed-0-answers.jsonl --every 5
