"""Text from a trained model: many sequences in one batch, each as if it were alone."""
