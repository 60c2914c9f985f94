"""Ahead-of-time compilation of the training step for devices that are not there, and what its program costs."""
