"""Held-out losses over all ranks, what follows from them, and texts that the model continues."""
