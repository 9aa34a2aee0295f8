"""The policy update: losses, packing of responses into micro-batches, scoring, metrics and checks of one step."""
