"""Decoding with a key/value cache.

Rows are aligned at their ends: shorter prompts begin with padding, so that all rows write the same slot of the cache. A
prompt is read in chunks, then tokens are made a few at a time on the device. Sizes are rounded up to buckets, and one
program is compiled for each: prefill by (rows, chunk, slots), decode by (rows, slots, kind of sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emo_jax import model, sharding
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.generation.placement import for_inference, power_of_two, round_rows
from emo_jax.generation.sampling import Sampling, sample
from emo_jax.model import KVCache
from emo_jax.moe.experts import Dispatch
from emo_jax.processes import gather_global
from emo_jax.rounding import round_up
from emo_jax.sharding import BATCH, place, reshard

PREFILL_CHUNK = 512  # longest part of a prompt that is read at once
DECODE_CHUNK = 16  # tokens between two looks of the host
Stop = Callable[[int, list[int]], bool]


class State(NamedTuple):
    """A batch between two chunks."""

    cache: KVCache
    logits: Float[Array, "B V"]  # for the next token
    position: Int[Array, "B"]  # where the next token stands
    finished: Bool[Array, "B"]


class Generator:
    """Makes tokens from `params` (as `checkpoint.restore_params` gives them). It keeps a copy of them in the compute
    dtype, so `params` can be dropped.

    allowed: bool [L, R], the routed experts of a subset, for all prompts that bring none. batch_size: rows at a time.
    """

    def __init__(self, config: Config, mesh: Mesh, params: model.Params, eos_ids: Sequence[int],
                 allowed: np.ndarray | None = None, batch_size: int = 16, max_length: int | None = None):
        if mesh.shape["sequence"] > 1:
            raise InputError(f"mesh.sequence={mesh.shape['sequence']} must be 1 for generation")
        self.config, self.mesh = config, mesh
        self.eos_ids = tuple(eos_ids)
        self.max_length = max_length or config.data.sequence_length
        self.batch_size = batch_size
        self._execution = self._decoding = model.Execution.of(config, mesh)
        if mesh.devices.flat[0].platform == "cpu":
            self._decoding = self._execution._replace(dispatch=Dispatch("few_tokens"))
        self._allowed = allowed
        self._params = for_inference(params, self._execution.dtype)
        self._prefill = jax.jit(self._prefill_chunk, donate_argnums=1)
        self._decode = jax.jit(self._decode_chunk, static_argnames=("kind", "count"), donate_argnums=1)

    def generate(self, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int, sampling: Sampling = Sampling(),
                 stop: Stop | None = None, allowed: Sequence[np.ndarray] | None = None) -> list[list[int]]:
        """The new tokens of every prompt, without the end-of-document token that ended it."""
        out = [[] for _ in prompts]
        for row, tokens in self.stream(prompts, max_new_tokens, sampling, stop, allowed):
            out[row].extend(tokens)
        return out

    def stream(self, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int, sampling: Sampling = Sampling(),
               stop: Stop | None = None, allowed: Sequence[np.ndarray] | None = None) -> Iterator[tuple[int, list[int]]]:
        """(row, its next tokens) as they are made; batches of similar length, longest first. `stop(row, all its new
        tokens)` ends a row early. `allowed`: bool [L, R] of every prompt, its routed experts; others compile nothing anew.
        Raises `InputError` for a prompt that is empty or does not fit."""
        sampling.check()
        if max_new_tokens < 1:
            raise InputError(f"max-new-tokens={max_new_tokens} must be at least 1")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {i + 1} is empty")
            if len(prompt) + max_new_tokens > self.max_length:
                raise InputError(f"prompt {i + 1} of {len(prompt)} tokens and max-new-tokens={max_new_tokens} do not "
                                 f"fit into the {self.max_length} tokens of a row (data.sequence_length)")
        if allowed is None and self._allowed is not None:
            allowed = [self._allowed] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            masks = None if allowed is None else [allowed[i] for i in rows]
            yield from self._batch(rows, [prompts[i] for i in rows], max_new_tokens, sampling, stop, masks)

    # ---- one batch ----

    def _batch(self, ids, prompts, max_new_tokens, sampling, stop, masks) -> Iterator[tuple[int, list[int]]]:
        with jax.set_mesh(self.mesh):
            allowed = None if masks is None else self._place(masks)
            state, free = self._read_prompts(prompts, max_new_tokens, allowed)
            rows = np.zeros(len(state.position), np.int32)
            rows[: len(ids)] = ids
            rows = place(rows, self.mesh, P(BATCH))
        made = {i: [] for i in ids}
        left, running = max_new_tokens, set(ids)
        while left > 0 and running:
            with jax.set_mesh(self.mesh):
                state, tokens = self._decode(
                    self._params, state, rows, allowed, jnp.float32(sampling.temperature), jnp.float32(sampling.top_p),
                    jnp.uint32(sampling.seed), kind=sampling.kind, count=min(DECODE_CHUNK, free))
                tokens = gather_global(tokens)[: len(ids), : min(left, tokens.shape[1])]
            left -= tokens.shape[1]
            free -= tokens.shape[1]
            for i, new in zip(ids, tokens.tolist()):
                if i not in running:
                    continue
                ended = next((n for n, t in enumerate(new) if t in self.eos_ids), None)
                new = new[:ended]
                made[i].extend(new)
                if ended is not None or (stop is not None and stop(i, made[i])):
                    running.discard(i)
                if new:
                    yield i, new
            finished = np.array([i not in running for i in ids] + [True] * (len(state.finished) - len(ids)))
            state = state._replace(finished=place(finished, self.mesh, P(BATCH)))

    def _place(self, masks: Sequence[np.ndarray]) -> Bool[Array, "L B 1 R"]:
        """The masks on the mesh; rows beyond theirs may use everything."""
        allowed = np.ones((round_rows(len(masks), self.mesh), *masks[0].shape), bool)
        allowed[: len(masks)] = masks
        return place(allowed.swapaxes(0, 1)[:, :, None], self.mesh, P(None, BATCH))

    def _read_prompts(self, prompts, max_new_tokens, allowed) -> tuple[State, int]:
        """The state before the first new token, and the free slots of its cache."""
        c, longest = self.config.model, max(map(len, prompts))
        chunk = min(PREFILL_CHUNK, power_of_two(longest, 16))
        length = round_up(longest, chunk)
        slots, rows = _slots(length + max_new_tokens), round_rows(len(prompts), self.mesh)
        tokens, segments = np.zeros((2, rows, length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt):] = prompt
            segments[row, length - len(prompt):] = 1
        positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
        heads = P(None, BATCH, "tensor", None, None)
        shape = (c.num_layers, rows, c.num_kv_heads, slots, c.head_dim)
        empty = jax.jit(lambda: (jnp.zeros(shape, self._execution.dtype), jnp.zeros(shape, self._execution.dtype)),
                        out_shardings=NamedSharding(self.mesh, heads))()
        cache = KVCache(*empty, place(np.zeros((rows, slots), np.int32), self.mesh, P(BATCH, None)), jnp.int32(0))
        for start in range(0, length, chunk):
            part = {name: place(a[:, start : start + chunk], self.mesh, sharding.TOKENS) for name, a in
                    (("tokens", tokens), ("segment_ids", segments), ("positions", positions))}
            cache, logits = self._prefill(self._params, cache, part, allowed)
        finished = np.arange(rows) >= len(prompts)
        position, finished = (place(x, self.mesh, P(BATCH)) for x in (positions[:, -1] + 1, finished))
        return State(cache, logits, position, finished), slots - length

    # ---- on the device ----

    def _prefill_chunk(self, params, cache: KVCache, part, allowed):
        x, cache = model.forward_with_cache(params, part, cache, self._execution, allowed)
        return cache, self._next_logits(params, x[:, -1:])

    def _next_logits(self, params, x) -> Float[Array, "B V"]:
        return reshard(model.logits(params, x, self._execution)[:, 0], BATCH, None)

    def _decode_chunk(self, params, state: State, rows, allowed, temperature, top_p, seed, *, kind, count):
        """`count` more tokens of every row [B, count]; after its end-of-document token a row makes any. Stops
        when all rows are finished."""
        def more(carry):
            step, state, _ = carry
            return (step < count) & ~jnp.all(reshard(state.finished, None))

        def body(carry):
            step, state, out = carry
            token = sample(state.logits, kind, temperature, top_p, seed, rows, state.position)
            finished = state.finished | jnp.any(token[:, None] == jnp.asarray(self.eos_ids, jnp.int32), axis=1)
            batch = {"tokens": token, "segment_ids": jnp.where(finished, 0, 1), "positions": state.position}
            batch = {name: reshard(a[:, None], BATCH, "sequence") for name, a in batch.items()}
            x, cache = model.forward_with_cache(params, batch, state.cache, self._decoding, allowed)
            out = jax.lax.dynamic_update_slice(out, token[:, None], (jnp.zeros_like(step), step))
            return step + 1, State(cache, self._next_logits(params, x), state.position + 1, finished), out

        out = jnp.zeros((len(rows), count), jnp.int32, out_sharding=P(BATCH, None))
        _, state, out = jax.lax.while_loop(more, body, (jnp.int32(0), state, out))
        return state, out


def _slots(n: int) -> int:
    """Buckets of the cache: powers of two, above 1024 multiples of it."""
    return power_of_two(n, 64) if n <= 1024 else round_up(n, 1024)
