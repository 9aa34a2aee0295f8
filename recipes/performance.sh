#!/usr/bin/env bash
# The tables of docs/performance.md. Each command prints its table, and JSON with the hardware in the last line.
# Needs the checkpoint Qwen2.5-Coder-0.5B-Instruct.
. "$(dirname "$0")/common.sh"
CKPT="${CKPT:-Qwen2.5-Coder-0.5B-Instruct}"
cost "not timed as a whole; every command prints its own times"

run "$PYTHON" benchmarks/budget.py
run "$PYTHON" benchmarks/step.py --ckpt "$CKPT" --micro-batch-tokens 700
run "$PYTHON" benchmarks/decode.py --ckpt "$CKPT" --repeats 2
run "$PYTHON" benchmarks/resident.py --ckpt "$CKPT" --steps 6
run "$PYTHON" benchmarks/adamw.py
run "$PYTHON" benchmarks/memory.py --ckpt "$CKPT" --groups 8 --prompts 1 --micro-batch-tokens 4096
