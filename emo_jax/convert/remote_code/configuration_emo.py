"""Configuration of EMO models, MoE and dense, for transformers 4.57 and later (trust_remote_code=True)."""

from transformers import PretrainedConfig


class EmoConfig(PretrainedConfig):
    """`num_experts` and `num_experts_per_tok` count the shared experts, which are the last ones of a layer and run for every
    token with the weight 1. The weights of the chosen routed experts are a softmax over all routed ones, with
    `norm_topk_prob` divided by their sum, and times `routed_scaling_factor`."""

    model_type = "emo"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  transformers declares it so

    def __init__(
        self, vocab_size=100352, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=None, head_dim=None, hidden_act="silu", max_position_embeddings=4096, initializer_range=0.02,
        rms_norm_eps=1e-6, use_cache=True, rope_theta=500000.0, num_experts=128, num_experts_per_layer=None,
        num_experts_per_tok=8, num_shared_experts=1, norm_topk_prob=False, routed_scaling_factor=1.0,
        output_router_logits=False, router_aux_loss_coef=0.01, tie_word_embeddings=False, **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act, self.max_position_embeddings = hidden_act, max_position_embeddings
        self.initializer_range, self.rms_norm_eps, self.use_cache = initializer_range, rms_norm_eps, use_cache
        # Later versions of transformers write rope_theta into this object.
        self.rope_theta = float((kwargs.pop("rope_parameters", None) or {}).get("rope_theta", rope_theta))
        self.num_experts, self.num_experts_per_layer = num_experts, num_experts_per_layer
        self.num_experts_per_tok, self.num_shared_experts = num_experts_per_tok, num_shared_experts
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.output_router_logits, self.router_aux_loss_coef = output_router_logits, router_aux_loss_coef
        # Later versions of transformers warn of the name rope_scaling, even where it is None.
        published = {"rope_scaling": kwargs.pop("rope_scaling", None), **kwargs}
        for key in ("rope_scaling", "attention_bias", "always_active_experts", "always_active_experts_per_layer",
                    "dense_intermediate_size", "dense_mlp_bias"):
            if published.get(key):
                raise ValueError(f"{key}={published[key]!r}: this code does not know it")
        if hidden_act != "silu" or tie_word_embeddings:
            raise ValueError(f"hidden_act={hidden_act!r}, tie_word_embeddings={tie_word_embeddings}: this code computes "
                             f"'silu' and False only")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def experts_of_layer(self, layer):
        return self.num_experts_per_layer[layer] if self.num_experts_per_layer else self.num_experts


class Olmo2NoQKNormPrenormConfig(EmoConfig):
    """A dense model."""

    model_type = "olmo2_noqknorm_prenorm"

    def __init__(self, num_experts=0, **kwargs):
        super().__init__(num_experts=num_experts, **kwargs)
