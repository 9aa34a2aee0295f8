#!/usr/bin/env bash
# SmolLM2-135M with LoRA on sums and differences: docs/experiments-appendix.md. Needs the checkpoint SmolLM2-135M-Instruct.
# Writes docs/results/smollm2-135m-lora.png and its folder of raw files.
. "$(dirname "$0")/common.sh"
cost "worked examples (not timed), then 15 minutes of steps, on two cores"

make models/smol-worked/config.json "$PYTHON" warm_start.py --ckpt SmolLM2-135M-Instruct --out models/smol-worked --task arithmetic \
    --num-terms 2 3 --num-digits 1 2 --operators +- --tokens 100000 --batch-tokens 800 --lr 5e-5 --room 160 --dtype bf16 \
    --eval-problems 192
train runs/smol-0 60 --ckpt models/smol-worked --config configs/cpu.yaml --num-terms 2 3 --num-digits 1 2 --operators +- \
    --prompts-per-step 8 --group-size 8 --max-new-tokens 100 --micro-batch-tokens 2048 --lora-rank 16 --lr 1.5e-4 \
    --lr-schedule cosine --advantage-scale none --warmup-steps 3 --format-weight 0.2 --eval-problems 192 --eval-every 20 \
    --no-curriculum
run "$PYTHON" docs/figures.py smollm2-135m-lora runs/smol-0 --problems 192
