"""A trained model: loaded into memory, and exported for other people's tools."""
