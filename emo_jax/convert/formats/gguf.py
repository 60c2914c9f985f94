"""One GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) run on a laptop.

Architectures of llama.cpp that compute our function exactly: `deepseek` (the first DeepSeek-MoE: softmax over the routed
experts, top-k without normalisation, shared experts without a gate) for `emo_v1`; `bailingmoe` (the same, with weights that are
normalised and scaled) for `emo_v2`, and where head_dim x num_heads is not d_model; `llama` for dense models. All three rotate
neighbouring values of a head, we halves, so the rows of q and k are put in that order.

The file is written by llama.cpp's own `gguf` package. Norms and routers stay float32 in every dtype.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config, ModelConfig
from emo_jax.convert.card import model_card
from emo_jax.convert.exporting import arrays
from emo_jax.convert.formats import Format, Options
from emo_jax.convert.gguf_tokenizer import add_tokenizer, require_tokenizer
from emo_jax.convert.layouts import Entry, require_same_experts
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, write_text

KINDS = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
BLOCK = 32  # values of a row that q8_0 and q4_0 give one scale


def require(c: Config) -> None:
    require_same_experts(c, "gguf")
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise InputError(f"--format gguf needs the package gguf ({e}): pip install 'emo-jax[gguf]'") from None


def write(found: Checkpoint, folder: AnyPath, options: Options) -> dict[str, Any]:
    import gguf

    config, kind = found.config, gguf.GGMLQuantizationType[KINDS[options.dtype]]
    plan = list(entries(config.model))
    kinds = [_kind(e, kind) for e in plan]
    architecture = architecture_of(config)
    tokenizer = require_tokenizer(found)
    name = f"{config.name}-{kind.name}.gguf"
    with tempfile.TemporaryDirectory() as scratch:  # the writer needs a local file
        local = folder / name if isinstance(folder, Path) else Path(scratch, name)
        writer = gguf.GGUFWriter(local, architecture)
        _add_model(writer, config)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, config.model.vocab_size)
        for e, kind in zip(plan, kinds):
            shape = gguf.quant_shape_to_byte_shape(e.shape, kind)
            writer.add_tensor_info(e.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for e, kind, values in zip(plan, kinds, arrays(plan, found)):
            if kind.name == "F16" and not -65504 < values.min() <= values.max() < 65504:
                raise InputError(f"{e.name}: values beyond 65,504, the largest of float16; give --dtype bf16")
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values), kind).view(np.uint8))
        writer.close()
        if local.parent != folder:
            with local.open("rb") as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
    write_text(folder / "README.md", model_card(found, options, architecture, "gguf"))
    return {"architecture": architecture, "tensors": len(plan), "file": name, "tokenizer": True}


def architecture_of(c: Config) -> str:
    if not c.model.num_experts:
        return "llama"
    exact = c.router.semantics == "emo_v1" and c.model.head_dim * c.model.num_heads == c.model.d_model
    return "deepseek" if exact else "bailingmoe"


def _add_model(writer: Any, c: Config) -> None:
    m = c.model
    writer.add_name(c.name)
    writer.add_vocab_size(m.vocab_size)
    writer.add_context_length(c.data.sequence_length)
    writer.add_embedding_length(m.d_model)
    writer.add_block_count(m.num_layers)
    writer.add_feed_forward_length(m.d_ff)
    writer.add_head_count(m.num_heads)
    writer.add_head_count_kv(m.num_kv_heads)
    writer.add_key_length(m.head_dim)
    writer.add_value_length(m.head_dim)
    writer.add_rope_dimension_count(m.head_dim)
    writer.add_rope_freq_base(m.rope_theta)
    writer.add_layer_norm_rms_eps(m.norm_eps)
    if not m.num_experts:
        return
    v2 = c.router.semantics == "emo_v2"
    writer.add_leading_dense_block_count(0)
    writer.add_expert_feed_forward_length(m.d_ff)
    writer.add_expert_count(m.num_routed_experts)
    writer.add_expert_used_count(m.routed_top_k)
    writer.add_expert_shared_count(max(m.num_shared_experts, 1))
    writer.add_expert_weights_norm(v2)
    writer.add_expert_weights_scale(float(m.routed_top_k) if v2 else 1.0)


def _kind(e: Entry, kind: Any) -> Any:
    import gguf

    if len(e.shape) == 1 or "ffn_gate_inp" in e.name:
        return gguf.GGMLQuantizationType.F32
    if kind.name.startswith("Q") and e.shape[-1] % BLOCK:
        raise InputError(f"--dtype {kind.name.lower()} needs rows of a multiple of {BLOCK} values; those of {e.name} have "
                         f"{e.shape[-1]}; give --dtype f16")
    return kind


# ---- tensors --------------------------------------------------------------------------------------------------------


def entries(m: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the file, in order; see `emo_jax.convert.layouts`. Nothing reads them back."""
    D, F, W, R, S = m.d_model, m.d_ff, m.head_dim, m.num_routed_experts, m.num_shared_experts
    yield _entry("token_embd.weight", (m.vocab_size, D), ("embedding",), (), lambda x: x)
    for i in range(m.num_layers):
        b, attention, table = f"blk.{i}.", ("layers", "attention"), ("layers", "moe")
        yield _entry(f"{b}attn_norm.weight", (D,), ("layers", "attention_norm"), (i,), lambda x: x)
        for n, heads in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads)):
            order = _pairs if n in "qk" else lambda x: x
            yield _entry(f"{b}attn_{n}.weight", (heads * W, D), (*attention, n), (i,),
                         lambda x, order=order: order(np.moveaxis(x, 0, 2)).reshape(-1, D))
        yield _entry(f"{b}attn_output.weight", (D, m.num_heads * W), (*attention, "o"), (i,), lambda x: x.reshape(-1, D).T)
        yield _entry(f"{b}ffn_norm.weight", (D,), ("layers", "mlp_norm"), (i,), lambda x: x)
        if not m.num_experts:
            for n, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                yield _entry(f"{b}ffn_{n}.weight", shape, ("layers", "mlp", n), (i,), lambda x: x.T)
            continue
        yield _entry(f"{b}ffn_gate_inp.weight", (R, D), (*table, "router"), (i,), lambda x: x[:, :R].T)
        routed, shared = (i, slice(0, R)), (i, slice(R, R + S))
        for n, shape in (("gate", (R, F, D)), ("up", (R, F, D)), ("down", (R, D, F))):
            yield _entry(f"{b}ffn_{n}_exps.weight", shape, (*table, n), routed, lambda x: x.swapaxes(1, 2))
        for n, shape, joint in (("gate", (S * F, D), lambda x: x.swapaxes(1, 2).reshape(-1, D)),
                                ("up", (S * F, D), lambda x: x.swapaxes(1, 2).reshape(-1, D)),
                                ("down", (D, S * F), lambda x: x.reshape(-1, D).T)):
            if S:  # several are one of their joint width
                yield _entry(f"{b}ffn_{n}_shexp.weight", shape, (*table, n), shared, joint)
            else:  # llama.cpp knows no such model without one: it is of zeros
                zeros = tuple(width or F for width in shape)
                yield _entry(f"{b}ffn_{n}_shexp.weight", zeros, (), (), lambda _, zeros=zeros: np.zeros(zeros, np.float32))
    yield _entry("output_norm.weight", (D,), ("final_norm",), (), lambda x: x)
    yield _entry("output.weight", (m.vocab_size, D), ("head",), (), lambda x: x.T)


def _entry(name, shape, leaf, index, to_theirs) -> Entry:
    return Entry(name, shape, leaf, index, lambda x: x, to_theirs)


def _pairs(x_HWD: np.ndarray) -> np.ndarray:
    """The values of a head that rotate together, W/2 apart, side by side."""
    H, W, D = x_HWD.shape
    return x_HWD.reshape(H, 2, W // 2, D).swapaxes(1, 2).reshape(H, W, D)


FORMAT = Format(tuple(KINDS), require, write)
