"""The `config.json` of a published checkpoint -> our config: EmoForCausalLM (standard MoE checkpoints too: they differ in
training only) and Olmo2NoQKNormPrenormForCausalLM."""

from __future__ import annotations

import dataclasses
from typing import Any

from emo_jax.config import Config, DataConfig, ModelConfig, RouterConfig, flatten
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, shortened

LAYOUT_OF = {"EmoForCausalLM": "emo", "Olmo2NoQKNormPrenormForCausalLM": "dense"}
# Published switches that our model has in one position only.
FIXED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "norm_topk_prob": False,
         "rope_scaling": None, "always_active_experts": None, "always_active_experts_per_layer": None,
         "dense_intermediate_size": None, "dense_mlp_bias": False}



def read_model(published: dict[str, Any], where: AnyPath) -> tuple[str, ModelConfig]:
    """(layout, model) of a config.json. Raises `InputError` naming the key that our model cannot express."""
    named = published.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in LAYOUT_OF:
        raise InputError(f"{where}: architectures={published.get('architectures')}; expected {' or '.join(LAYOUT_OF)}")
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: rope_parameters={shortened(repr(rope))} must be an object")
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{where}: rope_type={rope['rope_type']!r} is not supported, only unscaled positions are")
    for key, value in FIXED.items():
        if published.get(key, value) != value and key != "rope_scaling":
            raise InputError(f"{where}: {key}={published[key]!r} is not supported; only {value!r} is")

    def number(key, default=None, kinds=(int,)) -> Any:
        value = published.get(key, default)
        if type(value) not in kinds or (kinds == (int,) and not 0 <= value < 2**31):
            wanted = "an integer" if kinds == (int,) else "a number"
            raise InputError(f"{where}: {key}={shortened(repr(value))} must be {wanted}")
        return value

    def numbers(key) -> list[int]:
        values = published.get(key) or []
        if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**31 for n in values):
            raise InputError(f"{where}: {key}={shortened(repr(values))} must be integers")
        return values

    layout, heads, decimal = LAYOUT_OF[architecture], number("num_attention_heads"), (int, float)
    theta = rope.get("rope_theta", published.get("rope_theta", 10_000.0))
    if type(theta) not in decimal or not 0 < theta < 1e38:
        raise InputError(f"{where}: rope_theta={shortened(repr(theta))} must be a number above 0")
    common: dict[str, Any] = dict(
        vocab_size=number("vocab_size"), num_layers=number("num_hidden_layers"), d_model=number("hidden_size"),
        num_heads=heads, num_kv_heads=number("num_key_value_heads", heads), d_ff=number("intermediate_size"),
        head_dim=number("head_dim", 0) if published.get("head_dim") else number("hidden_size") // max(heads, 1),
        rope_theta=float(theta), norm_eps=number("rms_norm_eps", None, decimal),
        init_std=number("initializer_range", 0.02, decimal))
    if layout == "dense":
        return layout, ModelConfig(**common, num_experts=0, num_shared_experts=0, attention_scope="causal")
    shared, per_layer = number("num_shared_experts", 0), numbers("num_experts_per_layer")
    if any(n != shared for n in numbers("num_shared_experts_per_layer")):
        raise InputError(f"{where}: num_shared_experts_per_layer={published['num_shared_experts_per_layer']} must be "
                         f"num_shared_experts={shared} in every layer")
    experts = max(per_layer, default=number("num_experts"))
    uneven = tuple(per_layer) if any(n != experts for n in per_layer) else ()
    return layout, ModelConfig(**common, num_experts=experts, num_shared_experts=shared, experts_per_layer=uneven,
                               top_k=min(number("num_experts_per_tok"), experts))


def new_config(model: ModelConfig, published: dict[str, Any], name: str) -> Config:
    """A config around an imported model, everything that a config.json does not tell as published."""
    pools: dict[str, Any] = {}
    if model.num_experts:
        pools = dict(pool_min=max(model.routed_top_k, min(8, model.num_routed_experts)), pool_max=model.num_experts)
        pools["pool_max"] = max(pools.values())
    length = published.get("max_position_embeddings", 4096)
    if type(length) is not int or not 0 < length < 2**31:
        raise InputError(f"config.json of {name}: max_position_embeddings={shortened(repr(length))} must be an integer above 0")
    return Config(name=name, model=model, router=RouterConfig(**pools),
                  data=DataConfig(sequence_length=length, max_documents_per_row=min(64, length)))


def require_same(given: ModelConfig, found: ModelConfig, name: str, where: AnyPath) -> None:
    """`InputError` if the model of the config `name` is not the one in the checkpoint; what matters in training only
    may differ."""
    found = dataclasses.replace(found, init_std=given.init_std, attention_scope=given.attention_scope)
    if not found.num_experts and not given.num_experts:
        found = dataclasses.replace(found, num_shared_experts=given.num_shared_experts, top_k=given.top_k)
    ours, theirs = (flatten(dataclasses.asdict(m)) for m in (given, found))
    different = [f"model.{k}={ours[k]!r} ({where} has {theirs[k]!r})" for k in ours if ours[k] != theirs[k]]
    if different:
        raise InputError(f"config {name} is of another model: " + ", ".join(different))
