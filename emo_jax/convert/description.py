"""The `config.json` of a published checkpoint -> our config: EmoForCausalLM (standard MoE checkpoints too: they differ in
training only) and Olmo2NoQKNormPrenormForCausalLM."""

from __future__ import annotations

import dataclasses
from typing import Any

from emo_jax.config import Config, DataConfig, ModelConfig, RouterConfig, flatten
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, shortened

LAYOUT_OF = {"EmoForCausalLM": "emo", "Olmo2NoQKNormPrenormForCausalLM": "dense"}
LATER = "Olmo3MoeForCausalLM"  # of the later upstream trainer; its router is `router.semantics=emo_v2`
# What its blocks may have that ours have not, where it is not as given here.
LATER_WITHOUT = {
    "use_peri_ln": False, "use_rope": True, "latent_moe_dim": None, "use_head_qk_norm": False, "scalable_softmax": False,
    "attention_gate_type": None, "dense_layers_indices": None, "embed_norm": False, "embed_scale": 1.0,
    "gating_function": "softmax", "normalize_expert_weights": 1.0, "restore_weight_scale": True}
# Published switches that our model has in one position only.
FIXED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "norm_topk_prob": False,
         "rope_scaling": None, "always_active_experts": None, "always_active_experts_per_layer": None,
         "dense_intermediate_size": None, "dense_mlp_bias": False}



def read_model(published: dict[str, Any], where: AnyPath) -> tuple[str, ModelConfig]:
    """(layout, model) of a config.json. Raises `InputError` naming the key that our model cannot express."""
    named = published.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture == LATER:
        raise InputError(f"{where}: {LATER} cannot be imported: its blocks have norms behind attention and experts, ours "
                         f"before them" + "".join(_later_parts(published)))
    if not isinstance(architecture, str) or architecture not in LAYOUT_OF:
        raise InputError(f"{where}: architectures={published.get('architectures')}; expected {' or '.join(LAYOUT_OF)}")
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: rope_parameters={shortened(repr(rope))} must be an object")
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{where}: rope_type={rope['rope_type']!r} is not supported, only unscaled positions are")
    for key, value in FIXED.items():
        if key == "norm_topk_prob" and published.get(key) is True:
            continue  # emo_v2, see `new_config`
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


def _later_parts(published: dict[str, Any]) -> list[str]:
    """What else it has that our model has not, for a message."""
    parts = [f"; {key}={shortened(repr(published[key]))}" for key, value in LATER_WITHOUT.items()
             if published.get(key, value) not in (value, [])]
    others = sorted({kind for kind in published.get("layer_types") or [] if kind != "full_attention"})
    return parts + [f"; layer_types has {', '.join(map(str, others))}"] * bool(others)


def semantics_of(model: ModelConfig, published: dict[str, Any], where: AnyPath | str) -> str:
    """`router.semantics` of a config.json: the weights of the chosen experts as they are, or divided by their sum and times
    their number. Raises `InputError` for any other."""
    normalised, scale = published.get("norm_topk_prob", False), published.get("routed_scaling_factor", 1.0)
    if (normalised, scale) == (False, 1.0):
        return "emo_v1"
    if (normalised, scale) == (True, model.routed_top_k):
        return "emo_v2"
    raise InputError(f"{where}: norm_topk_prob={normalised!r} with routed_scaling_factor={shortened(repr(scale))} is not "
                     f"supported; false with 1.0 is (emo_v1), and true with {float(model.routed_top_k)} (emo_v2)")


def new_config(model: ModelConfig, published: dict[str, Any], name: str) -> Config:
    """A config around an imported model, everything that a config.json does not tell as published."""
    router: dict[str, Any] = {}
    if model.num_experts:
        least = max(model.routed_top_k, min(8, model.num_routed_experts))
        router = dict(pool_min=least, pool_max=max(least, model.num_experts))
        if semantics_of(model, published, f"config.json of {name}") == "emo_v2":
            router |= dict(semantics="emo_v2", load_balance_weight=0.01, router_z_weight=1e-5)  # as it is trained upstream
    length = published.get("max_position_embeddings", 4096)
    if type(length) is not int or not 0 < length < 2**31:
        raise InputError(f"config.json of {name}: max_position_embeddings={shortened(repr(length))} must be an integer above 0")
    return Config(name=name, model=model, router=RouterConfig(**router),
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
