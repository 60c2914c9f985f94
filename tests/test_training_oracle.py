"""Three optimizer steps of a tiny EMO equal the published trainer's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax import model, sharding
from emo_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RouterConfig, TrainConfig
from emo_jax.moe import routing
from emo_jax.train import step as train_step

FIXTURES = Path(__file__).parent / "fixtures"
EOS = 500
H, W = 4, 16


def config():
    labels = 64 / 63  # the published divisor counts labels, one fewer a row than tokens
    return Config(
        name="oracle",
        model=ModelConfig(vocab_size=512, num_layers=2, d_model=64, num_heads=H, num_kv_heads=H, head_dim=W, d_ff=32,
                          num_experts=16, top_k=4, attention_scope="causal"),
        router=RouterConfig(pool_min=4, pool_max=16, eos_owner="next", load_balance_weight=0.1 * labels,
                            router_z_weight=1e-3 * labels),
        data=DataConfig(sequence_length=64, max_documents_per_row=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
        train=TrainConfig(steps=3, batch_size=4, remat="none"), mesh=MeshConfig(data=1, fsdp=1))


def from_published(w):
    """Published names and layouts (Linear weights (out, in), experts [E, F, D]) -> our tree."""
    def layer(i):
        p = f"blocks.{i}."
        heads = {n: w[f"{p}attention.w_{n}.weight"].T.reshape(-1, H, W) for n in "qkv"}
        experts = {ours: w[f"{p}feed_forward_moe.experts.mlp.{theirs}"] for ours, theirs in
                   (("gate", "w1"), ("up", "w3"), ("down", "w2"))}
        return {"attention_norm": w[p + "attention_norm.weight"], "mlp_norm": w[p + "feed_forward_norm.weight"],
                "attention": heads | {"o": w[p + "attention.w_out.weight"].T.reshape(H, W, -1)},
                "moe": {"router": w[p + "feed_forward_moe.router.weight"][:15].T, "down": experts["down"],
                        "gate": experts["gate"].transpose(0, 2, 1), "up": experts["up"].transpose(0, 2, 1)}}

    layers = jax.tree.map(lambda *a: np.stack(a), layer(0), layer(1))
    tree = {"embedding": w["embeddings.weight"], "layers": layers, "final_norm": w["lm_head.norm.weight"],
            "head": w["lm_head.w_out.weight"].T}
    return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


def test_three_steps_equal_the_published_trainer(monkeypatch):
    inputs, expected, c = np.load(FIXTURES / "train_inputs.npz"), np.load(FIXTURES / "train_emo_main.npz"), config()
    mesh = sharding.make_mesh(c, jax.devices()[:1])
    documents = model.Execution.of(c, mesh, EOS).documents_per_row
    sizes = {}

    def published_sizes(router, seed, step, layers, document_ids, progress):
        return jnp.asarray(np.stack([sizes[s] for s in range(3)]))[step]

    for s in range(3):
        segments = inputs["pool_doc_ids"][s] - inputs["pool_doc_ids"][s].min(axis=1, keepdims=True)
        table, draws = np.zeros((2, 4, documents), np.int32), expected[f"pool_sizes/step{s}"]
        counts = segments.max(axis=1) + 1
        for row, start in enumerate(np.cumsum(counts) - counts):
            table[:, row, : counts[row]] = draws[:, start : start + counts[row]]
        sizes[s] = table
    monkeypatch.setattr(routing, "draw_pool_sizes", published_sizes)

    state = train_step.init_state(c, mesh)
    init = {k.removeprefix("init/"): inputs[k] for k in inputs if k.startswith("init/")}
    state = state._replace(params=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding),
                                               from_published(init), state.params))
    step = train_step.make_train_step(c, mesh, eos_id=EOS)
    for s in range(3):
        tokens = inputs["input_ids"][s].astype(np.int32)
        segments = inputs["attn_doc_ids"][s] - inputs["attn_doc_ids"][s].min(axis=1, keepdims=True) + 1
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        rows = np.tile(np.arange(64, dtype=np.int32), (4, 1))
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "loss_weights": weights, "positions": rows,
                 "segment_ids": segments.astype(np.int32), "document_ids": segments.astype(np.int32)}
        state, metrics = step(state, sharding.global_batch(mesh, batch))
        close = dict(rtol=5e-6)
        np.testing.assert_allclose(metrics["loss"], expected["metric/ce"][s], **close)
        np.testing.assert_allclose(metrics["total_loss"], expected["metric/total"][s], **close)
        np.testing.assert_allclose(metrics["grad_norm"], expected["metric/grad_norm_before_clip"][s], **close)
        np.testing.assert_allclose(metrics["load_balancing_loss"] * 64 / 63,
                                   expected["metric/lb_unweighted_per_layer"][s].mean(), **close)

    final = {k.removeprefix("final/"): expected[k] for k in expected if k.startswith("final/")}
    theirs = jax.tree.map(lambda a: a[1], from_published(init | final)["layers"])
    ours = jax.tree.map(lambda a: np.asarray(a)[1], state.params["layers"])
    for (path, value), want in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        # Adam amplifies elements whose gradient is nearly zero: a few may differ, none by more than a step.
        assert np.mean(np.abs(value - want) > 1e-5) < 2e-3, path
        np.testing.assert_allclose(value, want, atol=1e-3, err_msg=str(path))
