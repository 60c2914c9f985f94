"""Held-out loss by source label: nats per token, and per byte, which compares models with other tokenizers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from emo_jax import compat, sharding
from emo_jax.config import Config
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.processes import gather_global
from emo_jax.progress import track
from emo_jax.train.step import make_eval_step

LabelledRows = list[tuple[str, dict[str, np.ndarray]]]  # label, fields [n, T]


class Evaluation:
    """The same held-out rows, evaluated as often as wanted; rows of all labels share batches.

    The bytes of a row are the UTF-8 bytes of the targets that count.
    """

    def __init__(self, config: Config, mesh: Mesh, rows: LabelledRows, tokenizer: Tokenizer):
        self.labels = np.array([label for label, fields in rows for _ in fields["tokens"]])
        fields = {name: np.concatenate([f[name] for _, f in rows]) for name in rows[0][1]}
        token_bytes = tokenizer.token_bytes(config.model.vocab_size)
        self.bytes = (token_bytes[fields["targets"]] * fields["loss_weights"]).sum(axis=1)
        shards = sharding.batch_shards(mesh)
        wanted = min(config.train.batch_size // config.train.microbatches, len(self.labels))
        self._batch_size = math.ceil(wanted / shards) * shards
        padding = -len(self.labels) % self._batch_size  # rows of nothing: segment 0, loss weight 0
        self._fields = {name: np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)])
                        for name, x in fields.items()}
        self._mesh = mesh
        self._step = make_eval_step(config, mesh, tokenizer.eos_id)

    def __call__(self, params: dict) -> dict[str, Any]:
        """{"loss", "loss_per_byte", "bits_per_byte", "tokens", "bytes", "labels": {label: the same}}, summed over all
        tokens of the rows (of the label)."""
        return self.summary(*self.losses(params))

    def losses(self, params: dict, allowed: np.ndarray | None = None, what: str = "",
               pool_size: int | None = None, pool_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(nats, counted tokens) of every row [n], float64. `allowed`: routed experts that may be used, bool [L, R] for
        all rows or [L, n, R] for each. `pool_size`: routed experts (at least the top k) in the pool that every document
        chooses by its own votes, in each layer; `pool_tokens`: by those of its first so many tokens, and never by a token's
        future. Other values compile nothing anew. `what`: the work, for a line of progress."""
        loss, tokens = [], []
        size, voters = (None if n is None else np.int32(n) for n in (pool_size, pool_tokens))
        with compat.set_mesh(self._mesh):
            starts = range(0, len(self._fields["tokens"]), self._batch_size)
            for start in track(starts, what, "batches") if what else starts:
                rows = slice(start, start + self._batch_size)
                batch = {name: sharding.place(x[rows], self._mesh, sharding.TOKENS) for name, x in self._fields.items()}
                out = self._step(params, batch, self._mask(allowed, rows), size, voters)
                loss.append(out["loss_sum"])
                tokens.append(out["loss_tokens"])
            nats, counted = (np.concatenate([gather_global(x) for x in xs]).astype(np.float64)[:len(self.labels)]
                             for xs in (loss, tokens))
            return nats, counted

    def summary(self, loss: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
        """What `__call__` returns, from the rows' losses."""

        def total(where) -> dict[str, Any]:
            nats, count, size = loss[where].sum(), tokens[where].sum(), self.bytes[where].sum()
            per_byte = nats / max(size, 1)
            return {"loss": nats / max(count, 1), "loss_per_byte": per_byte, "bits_per_byte": per_byte / math.log(2),
                    "tokens": int(count), "bytes": int(size)}

        return total(slice(None)) | {"labels": {label: total(self.labels == label)
                                                for label in sorted(set(self.labels.tolist()))}}

    def _mask(self, allowed: np.ndarray | None, rows: slice):
        """The mask of a batch: None, or [L, B, 1, R] (padding rows may use everything)."""
        if allowed is None:
            return None
        allowed = np.asarray(allowed, bool)
        if allowed.ndim == 2:
            allowed = np.broadcast_to(allowed[:, None], (len(allowed), len(self.labels), allowed.shape[1]))
        part = allowed[:, rows]
        mask = np.ones((len(part), self._batch_size, 1, part.shape[2]), bool)
        mask[:, :part.shape[1], 0] = part
        return sharding.place(mask, self._mesh, sharding.P(None, sharding.BATCH))


def table(result: dict[str, Any]) -> str:
    """The result of an evaluation for people."""
    lines = [f"{'label':24} {'tokens':>10} {'nats/token':>11} {'nats/byte':>10} {'bits/byte':>10}"]
    for label, r in [*result["labels"].items(), ("all", result)]:
        lines.append(f"{label[:24]:24} {r['tokens']:10,} {r['loss']:11.4f} {r['loss_per_byte']:10.4f} "
                     f"{r['bits_per_byte']:10.4f}")
    return "\n".join(lines)
