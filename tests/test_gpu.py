"""On a GPU: the kernels that only run there equal their plain references, the training step equals the CPU's, and a run goes
on bit-identically. `launch/test.sh --gpu`."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import series, tiny_config

from emo_jax import sharding
from emo_jax.bench.step import random_batch, standard
from emo_jax.checkpoints import checkpoint
from emo_jax.config import override
from emo_jax.kernels import Kernel, attention, attention_gpu
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.train.loop import train
from emo_jax.train.step import init_state, make_train_step

REFERENCE = Kernel("reference")


@pytest.fixture(autouse=True)
def on_a_gpu():
    assert jax.default_backend() == "gpu"
    with jax.default_matmul_precision("highest"):
        yield


def attend(kernel, q, k, v, segments):
    heads = (sharding.BATCH, "sequence", "tensor", None)
    with jax.set_mesh(sharding.single_device_mesh()):
        place = lambda a, *axes: jax.device_put(a, jax.sharding.NamedSharding(sharding.single_device_mesh(), sharding.P(*axes)))
        q, k, v = (place(a, *axes) for a, axes in ((q, heads), (k, (sharding.BATCH, None, "tensor", None)),
                                                   (v, (sharding.BATCH, None, "tensor", None))))
        parts, whole = place(segments, *sharding.TOKENS), place(segments, sharding.BATCH, None)
        weights = place(jax.random.normal(jax.random.key(1), q.shape, jnp.float32), *heads)

        @jax.jit
        def run(q, k, v, parts, whole, weights):
            def loss(q, k, v):
                out = attention.attention(q, k, v, parts, whole, kernel)
                return jnp.sum(jnp.where((parts > 0)[..., None, None], out * weights, 0.0)), out

            gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
            return (jnp.where((parts > 0)[..., None, None], out, 0), *gradients)

        return [np.asarray(a, np.float32) for a in run(q, k, v, parts, whole, weights)]


@pytest.mark.parametrize("length", [256, 2048])
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 4, 128), (4, 2, 64), (2, 2, 32), (2, 1, 256)])
def test_flash_attention_is_as_near_to_fp32_as_the_plain_form(length, heads, kv_heads, width):
    """In bfloat16, values and gradients; rows of documents of all lengths, and padding."""
    draw = np.random.default_rng(0)
    array = lambda h: jnp.asarray(draw.normal(size=(2, length, h, width)), jnp.float32)
    q, k, v = array(heads), array(kv_heads), array(kv_heads)
    segments = jnp.asarray(np.sort(draw.integers(1, 6, (2, length)), axis=1), jnp.int32).at[1, -20:].set(0)
    want = attend(REFERENCE, q, k, v, segments)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    flash, plain = attend(Kernel("flash"), *half, segments), attend(REFERENCE, *half, segments)
    error = lambda got: [np.linalg.norm(g - w) / np.linalg.norm(w) for g, w in zip(got, want, strict=True)]
    assert all(f <= 1.5 * p < 0.05 for f, p in zip(error(flash), error(plain))), f"{error(flash)} against {error(plain)}"


def test_tokamax_is_what_runs():
    assert attention_gpu.TOKAMAX


@pytest.mark.parametrize("kernel, widths, dtype, rtol", [
    ("batched", (96, 160), jnp.float32, 1e-5), ("mosaic", (256, 128), jnp.bfloat16, 1e-2),
    ("mosaic", (128, 384), jnp.bfloat16, 1e-2), ("mosaic", (96, 160), jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("sizes", [[128, 0, 512, 128, 256], [0, 0, 0, 0, 1024], [0, 0, 0, 0, 0]], ids=str)
def test_grouped_matmul_equals_the_plain_form(sizes, kernel, widths, dtype, rtol):
    draw, groups, (D, F) = np.random.default_rng(0), jnp.asarray(sizes, jnp.int32), widths
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    x, w, weights = array(1024, D), array(5, D, F), array(1024, F)
    x = jnp.where(jnp.arange(1024)[:, None] < sum(sizes), x, 0)

    def run(kernel):
        out, adjoint = jax.vjp(lambda x, w: gmm.grouped_matmul(x, w, groups, kernel), x, w)
        d_x, d_w = adjoint(jnp.where(used, weights, 0))
        return [a.astype(jnp.float32) for a in (jnp.where(used, out, 0), jnp.where(used, d_x, 0), d_w)]

    used = jnp.arange(1024)[:, None] < sum(sizes)
    for g, w in zip(jax.jit(run, static_argnums=0)(Kernel(kernel)), jax.jit(run, static_argnums=0)(REFERENCE), strict=True):
        assert np.linalg.norm(g - w) <= rtol * np.linalg.norm(w)


def losses(devices, *overrides, steps=5):
    config = override(standard(), ["mesh.fsdp=1", "optimizer.warmup_steps=2", "train.compute_dtype=float32", *overrides])
    mesh = sharding.make_mesh(config, devices)
    step, state = make_train_step(config, mesh), init_state(config, mesh)
    batch = sharding.global_batch(mesh, random_batch(config, documents=4))
    out = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        out.append([float(metrics[name]) for name in ("loss", "grad_norm", "load_balancing_loss", "router_z_loss")])
    return np.asarray(out)


def test_five_steps_equal_those_of_a_cpu():
    """fp32, the same initial parameters, pools and rows; the kernels are those of each."""
    gpu = losses(jax.devices("gpu")[:1])
    with jax.default_device(jax.devices("cpu")[0]):
        cpu = losses(jax.devices("cpu")[:1], "kernels.attention=reference", "kernels.grouped_matmul=reference")
    np.testing.assert_allclose(gpu[:2], cpu[:2], rtol=1e-3)
    np.testing.assert_allclose(gpu[:, 0], cpu[:, 0], rtol=1e-3)  # norms drift apart as routers decide near ties otherwise


def test_five_steps_in_bfloat16_are_near_those_in_fp32():
    devices = jax.devices("gpu")[:1]
    half, whole = losses(devices, "train.compute_dtype=bfloat16"), losses(devices)
    np.testing.assert_allclose(half[:, 0], whole[:, 0], rtol=1e-2)


def test_a_run_that_stopped_goes_on_bit_identically(tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    train(tiny_config(folder, "train.steps=8", "checkpoint.every=4"), tmp_path / "run")
    cut = shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "8")
    assert train(tiny_config(folder, "train.steps=8"), cut)["resumed_from"] == 4
    assert series(cut) == series(tmp_path / "run")
    sums = [checkpoint.open_checkpoint(run).meta["checksums"] for run in (cut, tmp_path / "run")]
    assert sums[0] == sums[1]
