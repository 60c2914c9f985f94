"""The probability of given continuations: many rows of similar length at a time, each with its own context."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from emo_jax import model
from emo_jax.config import Config
from emo_jax.generation.placement import bucket, for_inference, power_of_two, round_rows
from emo_jax.processes import gather_global
from emo_jax.progress import Progress
from emo_jax.rounding import ceil_div, equal_parts
from emo_jax.sharding import BATCH, TOKENS, batch_shards, place

Ids = Sequence[int]
BATCH_TOKENS = 16_384  # a batch on each shard, padding included
LOGITS = 1 << 26  # values on each shard at a time


class Scorer:
    """`params` may be replaced between calls; nothing is compiled anew. allowed: bool [L, R], a subset's experts."""

    def __init__(self, config: Config, mesh: Mesh, params: model.Params | None = None,
                 allowed: np.ndarray | None = None):
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none"))
        self.config, self.mesh, self.max_length = config, mesh, config.data.sequence_length
        self._execution = model.Execution.of(config, mesh)
        self._allowed = None if allowed is None else jnp.asarray(allowed)
        self._score = jax.jit(self._score_batch)
        self.set_params(params)

    def set_params(self, params: model.Params | None) -> None:
        """None: lets go of them."""
        self._params = params and for_inference(params, self._execution.dtype)

    def __call__(self, pairs: list[tuple[Ids, Ids]], progress: bool = False) -> list[tuple[float, bool]]:
        """(sum of the log probabilities of the continuation in nats, whether greedy decoding makes it) of every
        (context, continuation). A pair that is longer than a row loses the beginning of its context; contexts must not
        be empty."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows = [([*context, *new][-self.max_length - 1:], len(new)) for context, new in pairs]
        order = [i for i in sorted(range(len(pairs)), key=lambda i: (-len(rows[i][0]), rows[i][1])) if rows[i][1]]
        done, shown = 0, Progress("scoring", len(order), "continuations")
        while done < len(order):
            T = min(bucket(len(rows[order[done]][0]) - 1), self.max_length)
            size = batch_shards(self.mesh) * max(1, power_of_two(BATCH_TOKENS // T + 1) // 2)
            chosen = order[done : done + size]
            sums, greedy = self._batch([rows[i] for i in chosen], T)
            for i, total, match in zip(chosen, sums.tolist(), greedy.tolist()):
                out[i] = (total, bool(match))
            done += len(chosen)
            if progress:
                shown.update(done)
        return out

    def _batch(self, rows: list[tuple[list[int], int]], T: int) -> tuple[np.ndarray, np.ndarray]:
        B, C = round_rows(len(rows), self.mesh), min(bucket(max(n for _, n in rows), least=8), T)
        fields = {name: np.zeros((B, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
        fields["positions"][:] = np.arange(T)
        at, targets, counts = np.zeros((B, C), np.int32), np.zeros((B, C), np.int32), np.zeros((B, C), bool)
        for b, (tokens, n) in enumerate(rows):
            n = min(n, len(tokens) - 1)
            fields["tokens"][b, : len(tokens) - 1] = tokens[:-1]
            fields["segment_ids"][b, : len(tokens) - 1] = 1
            at[b, :n], targets[b, :n] = np.arange(len(tokens) - 1 - n, len(tokens) - 1), tokens[-n:]
            counts[b, :n] = True
        with jax.set_mesh(self.mesh):
            batch = {name: place(x, self.mesh, TOKENS) for name, x in fields.items()}
            wanted = [place(x, self.mesh, P(BATCH, None)) for x in (at, targets, counts)]
            nats, best = (gather_global(x)[: len(rows)] for x in self._score(self._params, batch, *wanted))
            return nats, best

    def _score_batch(self, params, batch, at: Int[Array, "B C"], targets: Int[Array, "B C"], counts):
        x_BTD, _ = model.forward(params, batch, self._execution, allowed=self._allowed)
        B, C = at.shape
        # Only the positions that predict a continuation need logits; a matmul with a 0/1 matrix picks them exactly.
        pick = (at[..., None] == jnp.arange(x_BTD.shape[1])).astype(x_BTD.dtype)
        x_BCD = jnp.einsum("bct,btd->bcd", pick, x_BTD, precision=jax.lax.Precision.HIGHEST,
                           out_sharding=P(BATCH, None, None))
        values = B // batch_shards(self.mesh) * C * self.config.model.vocab_size
        part = equal_parts(C, min(C, ceil_div(values, LOGITS)))

        def scores(inputs):
            x, targets = inputs
            head = model.gather_weight(params["head"], self._execution.dtype, None, None)
            logits = jnp.einsum("bcd,dv->bcv", x, head, preferred_element_type=jnp.float32)
            chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
            log_probs = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
            return log_probs, jnp.argmax(logits, axis=-1) == targets

        split = lambda a: jnp.moveaxis(a.reshape(B, part, C // part, *a.shape[2:]), 1, 0)
        log_probs, match = (jnp.moveaxis(a, 0, 1).reshape(B, C)
                            for a in jax.lax.map(scores, (split(x_BCD), split(targets))))
        return jnp.sum(jnp.where(counts, log_probs, 0.0), axis=1), jnp.all(match | ~counts, axis=1)
