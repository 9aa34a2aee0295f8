#!/usr/bin/env bash
# pass@k of the bundled model before and after the default run: docs/sharpening.md and docs/experiments.md.
# Writes docs/results/pass-at-128.png and docs/results/pass-at-128/seed-N.json.
. "$(dirname "$0")/common.sh"
SEEDS="${SEEDS/0 1 2/0}"
cost "6 to 15 minutes of training per seed on one thread; the sampling was not timed"

for seed in $SEEDS; do
    train "runs/tiny-$seed" 75 --seed "$seed"
    make "docs/results/pass-at-128/seed-$seed.json" "$PYTHON" evaluate.py --config configs/countdown-tiny.yaml \
        --samples 128 --eval-problems 256 --ckpt countdown-tiny --after "runs/tiny-$seed/checkpoints/step-000075" \
        --json "docs/results/pass-at-128/seed-$seed.json"
done
run "$PYTHON" docs/pass_at_k.py
