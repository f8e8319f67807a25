"""Checkpoints: writing, verifying, keeping, resuming and resharding them."""
