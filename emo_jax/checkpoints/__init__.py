"""What lies on disk of a trained model: checkpoints, written, read, verified and rewritten tensor by tensor, and subsets."""
