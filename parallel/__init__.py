"""Several processes: data parallelism and sharded weights."""
