"""Data for training: files on disk become micro-batches of token ids, labels and document lengths, the same on every run."""
