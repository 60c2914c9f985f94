"""Text from a checkpoint: sampling, and decoding of batches with a key/value cache."""
