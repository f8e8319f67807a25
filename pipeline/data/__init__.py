"""What a rank reads: the dataset, the order of its samples, batches."""
