"""What a run measures of itself: losses, seconds, use of its devices, a trace of some steps."""
