"""emo_jax: pretraining mixture-of-experts language models whose experts group into modules, in JAX."""

__version__ = "0.1.0"
