"""Training: one process per rank, started by `deepspeed`."""
