"""Text in, shards out. Never imports torch."""
