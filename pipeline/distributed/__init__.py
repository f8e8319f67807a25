"""The ranks together: their start and end, agreement, stopping, and the watch over hangs."""
