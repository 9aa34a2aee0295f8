#!/usr/bin/env bash
# The tables of docs/scaling.md. Each command prints its table, and JSON with the hardware in the last line.
. "$(dirname "$0")/common.sh"
cost "not timed as a whole; every command prints its own times"

run "$PYTHON" benchmarks/scaling.py --ckpt countdown-tiny
run "$PYTHON" benchmarks/scaling.py --ckpt countdown-tiny --shard-weights --ranks 2
run "$PYTHON" benchmarks/transfer.py
run "$PYTHON" benchmarks/simulate.py
run "$PYTHON" benchmarks/staleness.py
