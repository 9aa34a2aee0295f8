#!/usr/bin/env bash
# A task that was not trained: reasoning-gym's chain_sum before and after digits.sh. docs/experiments-appendix.md.
# Needs reasoning-gym: pip install reasoning-gym. Writes docs/results/digits-qwen2.5-coder-0.5b/reasoning-gym-chain-sum.json.
. "$(dirname "$0")/common.sh"
cost "digits.sh first; the sampling was not timed"

run "$PYTHON" evaluate.py --config configs/cpu.yaml --ckpt models/digits --after runs/digits-0/checkpoints/step-000030 \
    --max-new-tokens 160 --task reasoning_gym:chain_sum --samples 1 --eval-problems 64 \
    --json docs/results/digits-qwen2.5-coder-0.5b/reasoning-gym-chain-sum.json
