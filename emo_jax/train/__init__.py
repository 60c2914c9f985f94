"""Training: optimizer, step, loop, checkpoints, metrics, evaluation, and what happens when something goes wrong."""
