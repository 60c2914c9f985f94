"""Norm of an expert's weighted output: the sum over the text, so that frequency, weight and strength all count, which suits one
known task (a member of the family of arXiv 2606.15716). `reap` is the same without the frequency."""

from __future__ import annotations

from emo_jax.subsets.methods import Method, reap
from emo_jax.subsets.sweep import Statistic, total

METHOD = Method(statistic=Statistic(reap.collect, total))
