"""How published checkpoints name and lay out our parameters: one table, read in both directions.

An `Entry` is one published tensor and the part of one of our arrays that it holds. Published weights are (out, in);
ours are (in, out), heads apart. Layouts: `emo` (EmoForCausalLM), `dense` (Olmo2NoQKNormPrenormForCausalLM), `llama` and
`qwen2_moe` (what stock transformers and vLLM support), `olmo_core` (the trainer's own state dict). D, V, ...: see
`emo_jax.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from emo_jax.config import Config, ModelConfig
from emo_jax.errors import InputError

Convert = Callable[[Any], np.ndarray]  # takes an array; `to_theirs` of None where nothing of ours is behind a tensor


class Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]  # published
    leaf: tuple[str, ...]  # our array; (): none, the published tensor is constant
    index: tuple  # the part of it
    to_ours: Convert
    to_theirs: Convert
    dead_rows: int = 0  # rows at the end of a router that belong to shared experts and choose nothing


NORMS = {
    "emo": ("pre_attention_layernorm", "pre_feedforward_layernorm"),
    "dense": ("pre_attention_layernorm", "pre_feedforward_layernorm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "qwen2_moe": ("input_layernorm", "post_attention_layernorm"),
}


def entries(layout: str, m: ModelConfig, routed_scale: float = 1.0) -> Iterator[Entry]:
    """Every tensor of a published checkpoint of this model, in the order in which it is written. `routed_scale`: what their
    routed experts give is so many times ours (their weights being less)."""
    if layout == "olmo_core":
        yield from _olmo_core(m)
        return
    yield _plain("model.embed_tokens.weight", ("embedding",), (), (m.vocab_size, m.d_model))
    for i in range(m.num_layers):
        p = f"model.layers.{i}."
        for norm, leaf in zip(NORMS[layout], ("attention_norm", "mlp_norm")):
            yield _plain(f"{p}{norm}.weight", ("layers", leaf), (i,), (m.d_model,))
        yield from _attention(m, i, {n: f"{p}self_attn.{n}_proj.weight" for n in "qkvo"})
        if layout == "qwen2_moe":  # vLLM does not know this architecture without biases
            for n, heads in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads)):
                yield _constant(f"{p}self_attn.{n}_proj.bias", (heads * m.head_dim,))
        if layout in ("dense", "llama"):
            yield from _swiglu(f"{p}mlp.", ("layers", "mlp"), (i,), m.d_model, m.d_ff)
            continue
        num_experts = experts_of_layer(m, i)
        routed, shared = num_experts - m.num_shared_experts, m.num_shared_experts
        dead = shared if layout == "emo" else 0
        yield _router(f"{p}mlp.gate.weight", i, routed, dead, m)
        for e in range(routed + dead):
            row = e if e < routed else m.num_experts - shared + e - routed
            scale = routed_scale if e < routed else 1.0
            yield from _swiglu(f"{p}mlp.experts.{e}.", ("layers", "moe"), (i, row), m.d_model, m.d_ff, scale)
        if layout == "qwen2_moe":
            yield from _gated_shared_expert(f"{p}mlp.", i, m)
    yield _plain("model.norm.weight", ("final_norm",), (), (m.d_model,))
    yield _linear("lm_head.weight", ("head",), (), (m.d_model, m.vocab_size))


def experts_of_layer(m: ModelConfig, layer: int) -> int:
    return m.experts_per_layer[layer] if m.experts_per_layer else m.num_experts


# ---- what a format may need of a model ------------------------------------------------------------------------------


def require_v1(c: Config) -> None:
    if c.router.semantics != "emo_v1":
        raise InputError(f"router.semantics={c.router.semantics} cannot be exported: the weights of its experts are "
                         f"normalised over the chosen ones and scaled; the published emo_v1 knows neither")


def require_same_experts(c: Config, form: str) -> None:
    counts = {experts_of_layer(c.model, i) for i in range(c.model.num_layers)}
    if len(counts) > 1:
        raise InputError(f"--format {form} needs the same number of experts in every layer, not "
                         f"model.experts_per_layer={c.model.experts_per_layer}; --format hf allows it")


# ---- kinds of tensors -----------------------------------------------------------------------------------------------


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _plain(name, leaf, index, shape) -> Entry:
    return Entry(name, shape, leaf, index, _same, _same)


def _constant(name, shape, value: float = 0.0) -> Entry:
    return Entry(name, shape, (), (), _same, lambda _: np.full(shape, value, np.float32))


def _linear(name, leaf, index, ours, inputs: int = 1, scale: float = 1.0) -> Entry:
    """A matrix whose part `ours` of our array has its `inputs` first axes as input and the others as output; theirs is
    `scale` times ours."""
    n_in, n_out = int(np.prod(ours[:inputs])), int(np.prod(ours[inputs:]))
    factor = np.float32(scale)
    return Entry(name, (n_out, n_in), leaf, index,
                 lambda x: x.T.reshape(ours) / factor, lambda x: factor * x.reshape(n_in, n_out).T)


def _attention(m: ModelConfig, i: int, names: dict[str, str]) -> Iterator[Entry]:
    for n, heads in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads)):
        yield _linear(names[n], ("layers", "attention", n), (i,), (m.d_model, heads, m.head_dim))
    yield _linear(names["o"], ("layers", "attention", "o"), (i,), (m.num_heads, m.head_dim, m.d_model), inputs=2)


def _swiglu(prefix, leaf, index, width, hidden, scale: float = 1.0) -> Iterator[Entry]:
    for n in ("gate", "up"):
        yield _linear(f"{prefix}{n}_proj.weight", (*leaf, n), index, (width, hidden))
    yield _linear(f"{prefix}down_proj.weight", (*leaf, "down"), index, (hidden, width), scale=scale)


def _router(name, layer, routed, dead, m: ModelConfig) -> Entry:
    """Our router has a column for every routed expert of the widest layer; columns of experts that a pruned layer lacks
    are zeros, as are the `dead` rows unless they are put back (see `emo_jax.convert.exporting`)."""
    def to_ours(x):
        return np.pad(x[:routed].T, ((0, 0), (0, m.num_routed_experts - routed)))

    def to_theirs(x):
        return np.pad(x[:, :routed].T, ((0, dead), (0, 0)))

    return Entry(name, (routed + dead, m.d_model), ("layers", "moe", "router"), (layer,), to_ours, to_theirs, dead)


def _gated_shared_expert(prefix: str, i: int, m: ModelConfig) -> Iterator[Entry]:
    """Qwen2-MoE multiplies its shared expert by sigmoid(gate . x). With a gate so small that is exactly 1/2 in float32, and a
    doubled down projection makes up for it exactly, as doubling a floating-point number loses nothing. The gate is not 0
    because llama.cpp divides by gate . x. Several shared experts are one of their joint width; without any, one of width 1
    that is zero."""
    table, D, S = ("layers", "moe"), m.d_model, m.num_shared_experts
    width, rows = max(S * m.d_ff, 1), (i, slice(m.num_experts - S, m.num_experts))

    yield _constant(f"{prefix}shared_expert_gate.weight", (1, D), 1e-10)
    names = {n: f"{prefix}shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")}
    if not S:
        for n, shape in (("gate", (1, D)), ("up", (1, D)), ("down", (D, 1))):
            yield _constant(names[n], shape)
        return
    for n in ("gate", "up"):  # [S, D, F] <-> [S F, D]
        yield Entry(names[n], (width, D), (*table, n), rows,
                    lambda x: x.reshape(S, -1, D).swapaxes(1, 2), lambda x: x.swapaxes(1, 2).reshape(-1, D))
    yield Entry(names["down"], (D, width), (*table, "down"), rows,  # [S, F, D] <-> [D, S F]
                lambda x: 0.5 * x.T.reshape(S, -1, D), lambda x: 2.0 * x.reshape(-1, D).T)


# ---- the trainer's state dict ---------------------------------------------------------------------------------------


def _olmo_core(m: ModelConfig) -> Iterator[Entry]:
    """w1 = gate, w3 = up, w2 = down. Of experts they are [E F, D] each, the router is flat [E D]; tensors that are not
    flattened ([E, F, D], [E, D]) hold the same elements in the same order, see `same_elements`."""
    D, F, E, S = m.d_model, m.d_ff, m.num_experts, m.num_shared_experts
    yield _plain("embeddings.weight", ("embedding",), (), (m.vocab_size, D))
    for i in range(m.num_layers):
        p = f"blocks.{i}."
        yield _plain(f"{p}attention_norm.weight", ("layers", "attention_norm"), (i,), (D,))
        yield _plain(f"{p}feed_forward_norm.weight", ("layers", "mlp_norm"), (i,), (D,))
        yield from _attention(m, i, {n: f"{p}attention.w_{'out' if n == 'o' else n}.weight" for n in "qkvo"})
        if not E:
            for theirs, ours, shape in (("w1", "gate", (D, F)), ("w3", "up", (D, F)), ("w2", "down", (F, D))):
                yield _linear(f"{p}feed_forward.{theirs}.weight", ("layers", "mlp", ours), (i,), shape)
            continue
        router = _router("", i, E - S, S, m)
        yield router._replace(name=f"{p}feed_forward_moe.router.weight", shape=(E * D,),
                              to_ours=lambda x, matrix=router.to_ours: matrix(x.reshape(E, D)),
                              to_theirs=lambda x, matrix=router.to_theirs: matrix(x).reshape(-1))
        for theirs, ours in (("w1", "gate"), ("w3", "up")):
            yield Entry(f"{p}feed_forward_moe.experts.mlp.{theirs}", (E * F, D), ("layers", "moe", ours), (i,),
                        lambda x: x.reshape(E, F, D).swapaxes(1, 2), lambda x: x.swapaxes(1, 2).reshape(-1, D))
        yield Entry(f"{p}feed_forward_moe.experts.mlp.w2", (E * F, D), ("layers", "moe", "down"), (i,),
                    lambda x: x.reshape(E, F, D), lambda x: x.reshape(-1, D))
    yield _plain("lm_head.norm.weight", ("final_norm",), (), (D,))
    yield _linear("lm_head.w_out.weight", ("head",), (), (D, m.vocab_size))


def same_elements(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one shape is the other with axes flattened or split, e.g. (E D,) and (E, D)."""
    return np.prod(shape, dtype=np.int64) == np.prod(other, dtype=np.int64) and (
        shape[-1] == other[-1] or 1 in (len(shape), len(other)))
