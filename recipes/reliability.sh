#!/usr/bin/env bash
# The measurements of docs/reliability.md. Each command prints JSON with the hardware in its last line.
. "$(dirname "$0")/common.sh"
cost "kills.py about a minute, soak.py about five minutes on one core; splits.py was not timed"

run "$PYTHON" benchmarks/kills.py
run "$PYTHON" benchmarks/splits.py
run "$PYTHON" benchmarks/soak.py --steps 2000
