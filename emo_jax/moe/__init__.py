"""Mixture-of-experts layer: routing, losses, and the dispatch of tokens to experts."""
