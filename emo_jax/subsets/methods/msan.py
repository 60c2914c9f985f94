"""Squared norm of an expert's output without the router's weight: the mean over its tokens (MSAN, arXiv 2606.15716).
Strong outputs count more than in `man`."""

from __future__ import annotations

import functools

from emo_jax.subsets.methods import Method, man
from emo_jax.subsets.sweep import Statistic, mean

METHOD = Method(statistic=Statistic(functools.partial(man.collect, power=2), mean))
