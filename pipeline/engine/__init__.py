"""The DeepSpeed engine: its configuration, the optimizer and all that touches DeepSpeed's inside."""
