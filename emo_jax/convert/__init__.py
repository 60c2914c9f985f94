"""Hugging Face checkpoints in and out, and OLMo-core state dicts in; tensor by tensor, never a whole model at once."""
