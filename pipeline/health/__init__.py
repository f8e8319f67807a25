"""Bad numbers: what a run remembers of them, what it decides, and what it writes down."""
