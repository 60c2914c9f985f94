"""EMO models, MoE and dense, in PyTorch, for transformers 4.57 and later (trust_remote_code=True).

A layer is h = x + attention(norm(x)), y = h + experts(norm(h)). There are no document pools here, as in published inference:
a token's experts are the strongest of all. B: rows, T: new tokens, S: cached and new tokens, D: width, R: routed experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_emo import EmoConfig, Olmo2NoQKNormPrenormConfig

# The name that this version of transformers has for what attention remembers.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class EmoRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        x32 = x.float()
        return (self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class EmoMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EmoSparseMoeBlock(nn.Module):
    """The gate has rows for the shared experts too, which choose nothing."""

    def __init__(self, config, layer):
        super().__init__()
        experts, self.config = config.experts_of_layer(layer), config
        self.num_routed = experts - config.num_shared_experts
        self.top_k = min(config.num_experts_per_tok - config.num_shared_experts, self.num_routed)
        self.gate = nn.Linear(config.hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(EmoMLP(config) for _ in range(experts))

    def forward(self, x):
        """(the sum of the experts of every token, router logits [B T, R])"""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)[:, :self.num_routed]
        weights, chosen = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = (weights * self.config.routed_scaling_factor).to(x.dtype).flatten()
        out = torch.zeros_like(rows)
        # Choices sorted by expert: every expert that was chosen runs once, on its tokens.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.num_routed).tolist()
        for expert, choices in zip(self.experts, order.split(counts)):
            if len(choices):
                tokens = choices // self.top_k
                out.index_add_(0, tokens, expert(rows[tokens]) * weights[choices, None])
        for expert in self.experts[self.num_routed:]:
            out = out + expert(rows)
        return out.reshape(x.shape), logits


class EmoAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, cache):
        """`mask` [B, 1, T, S], True where a token may look; None: at all tokens before it."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotary_angles(positions, config):
    """cos and sin [B, 1, T, head_dim / 2], fp32. Computed anew: a buffer would be lost where weights are loaded lazily."""
    size = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None, :, None].float() * config.rope_theta ** -size
    return angles.cos(), angles.sin()


def rotate(x, rotary):
    """Dimension i of the first half turns with dimension i of the second, in fp32."""
    (first, second), (cos, sin) = x.float().chunk(2, dim=-1), rotary
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_mask_of(given, rows, new, past, device):
    """`given`: [B, S] with 0 at padding, [B, 1, T, S], or None. None where causal attention over all tokens is meant."""
    if given is not None and given.dim() == 4:
        return given if given.dtype == torch.bool else given >= 0
    if given is not None:
        given = given.bool()
        given = None if bool(given.all()) else given
    if given is None and (past == 0 or new == 1):
        return None
    at = torch.arange(past, past + new, device=device)[:, None]
    keys = torch.arange(past + new, device=device)
    mask = (keys <= at).expand(rows, 1, -1, -1)
    if given is not None:  # a padding token sees itself, as a softmax over nothing is none
        mask = (mask & given[:, None, None, :]) | (keys == at)
    return mask


class EmoDecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.pre_attention_layernorm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = EmoAttention(config, layer)
        self.pre_feedforward_layernorm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = EmoSparseMoeBlock(config, layer) if config.num_experts else EmoMLP(config)

    def forward(self, x, rotary, mask, cache):
        h = x + self.self_attn(self.pre_attention_layernorm(x), rotary, mask, cache)
        y = self.mlp(self.pre_feedforward_layernorm(h))
        y, logits = y if isinstance(y, tuple) else (y, None)
        return h + y, logits


class EmoPreTrainedModel(PreTrainedModel):
    config_class = EmoConfig
    base_model_prefix = "model"
    _no_split_modules = ["EmoDecoderLayer"]  # noqa: RUF012  transformers declares it so
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, 0.0, self.config.initializer_range, -3 * self.config.initializer_range,
                                  3 * self.config.initializer_range)
        elif isinstance(module, EmoRMSNorm):
            nn.init.ones_(module.weight)


class EmoModel(EmoPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EmoDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_hidden_states=None, cache=None, **kwargs):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0
        rows, new = x.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x.device)[None]
        rotary = rotary_angles(position_ids, self.config)
        mask = attention_mask_of(attention_mask, rows, new, past, x.device)
        hidden, logits = [x], []
        for layer in self.layers:
            x, router_logits = layer(x, rotary, mask, cache)
            hidden.append(x)
            logits.append(router_logits)
        x = hidden[-1] = self.norm(x)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return MoeModelOutputWithPast(
            last_hidden_state=x, hidden_states=tuple(hidden) if wanted else None,
            router_logits=tuple(logits) if self.config.num_experts else None, **{CACHE: cache})


class EmoForCausalLM(EmoPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = EmoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, module):
        self.lm_head = module

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_hidden_states=None, output_router_logits=None, logits_to_keep=0,
                cache=None, **kwargs):
        """`labels` [B, T], -100 where nothing counts: `loss` is the mean cross entropy, with `output_router_logits` plus
        `config.router_aux_loss_coef` times the load-balancing loss."""
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                         output_hidden_states, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else (
            slice(None) if isinstance(logits_to_keep, int) else logits_to_keep)
        logits = self.lm_head(out.last_hidden_state[:, kept])
        with_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        with_router = with_router and out.router_logits is not None
        loss = balance = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if with_router:
            balance = load_balancing_loss(out.router_logits, self.config, attention_mask)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=balance, logits=logits, hidden_states=out.hidden_states,
            router_logits=out.router_logits if with_router else None, **{CACHE: getattr(out, CACHE)})


def load_balancing_loss(router_logits, config, attention_mask=None):
    """Mean over the layers of R / k sum_e (share of the tokens that choose e) (mean probability of e): 1 when all routed
    experts are used alike. `router_logits`: [B T, R] of every layer; padding does not count."""
    losses = []
    for logits in router_logits:
        if attention_mask is not None and attention_mask.numel() == len(logits):
            logits = logits[attention_mask.bool().flatten()]
        probabilities, num_routed = logits.float().softmax(-1), logits.shape[-1]
        k = min(config.num_experts_per_tok - config.num_shared_experts, num_routed)
        chosen = F.one_hot(probabilities.topk(k, dim=-1).indices, num_routed).sum(1).float()
        losses.append(num_routed / max(k, 1) * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


class Olmo2NoQKNormPrenormForCausalLM(EmoForCausalLM):
    """A dense model."""

    config_class = Olmo2NoQKNormPrenormConfig
