"""Grouped matmul, attention and loss: one choice per platform, each with a plain reference."""
