"""A training run: options, checkpoints, logs and the terminal display."""
