"""Every kernel equals its plain reference, values and gradients; Pallas kernels run interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

from emo_jax import sharding
from emo_jax.errors import InputError
from emo_jax.kernels import Kernel, attention, attention_gpu, blocked_matmul, cross_entropy, expert_mlp_tpu
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.kernels.rotary import rotary_angles, rotate
from emo_jax.model import REMAT_POLICIES

SPLASH, FLASH = Kernel("splash", interpret=True), Kernel("flash", interpret=True)
BLOCKED, REFERENCE = Kernel("blocked"), Kernel("reference")
Q, D, F, E = 384, 32, 16, 5
GROUPS = {  # multiples of 128, the alignment of the batched kernel; blocked has 64
    "several": [128, 0, 128, 0, 128], "one": [0, 384, 0, 0, 0], "the last": [0, 0, 0, 0, 256], "none": [0, 0, 0, 0, 0],
}
UNALIGNED = {"unaligned": [10, 0, 83, 4, 95], "single rows": [1, 1, 1, 1, 1], "one and padding": [0, 0, 77, 0, 0]}


def arrays(seed=0):
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(0.3 * draw.normal(size=shape), jnp.float32)
    return array(Q, D), array(E, D, 2 * F), array(E, F, D), array(Q)


def mlp_reference(rows, gate_up, down, weights, group_sizes):
    hidden = gmm.swiglu(gmm.reference(rows, gate_up, group_sizes))
    return gmm.reference(hidden * weights[:, None], down, group_sizes)


def value_and_grads(mlp, group_sizes, *args):
    """Gradients of a loss over the rows that belong to a group: what the others hold does not matter."""
    used = jnp.arange(Q)[:, None] < sum(group_sizes)
    loss = lambda *args: jnp.sum(jnp.where(used, jnp.sin(mlp(*args, jnp.asarray(group_sizes, jnp.int32))), 0))
    value, (d_rows, d_gate_up, d_down, d_weights) = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*args)
    return value, jnp.where(used, d_rows, 0), d_gate_up, d_down, jnp.where(used[:, 0], d_weights, 0)


@pytest.mark.parametrize("kernel, groups", [(k, g) for k in ("blocked", "batched", "megablox", "fused")
                                            for g in (*GROUPS, *UNALIGNED) if k in gmm.PALLAS or g in GROUPS])
def test_experts_of_grouped_rows(kernel, groups):
    sizes = (GROUPS | UNALIGNED)[groups]
    rows, *others = arrays()
    rows = jnp.where(jnp.arange(Q)[:, None] < sum(sizes), rows, 0)  # as the dispatch plan fills them
    got = value_and_grads(lambda *args: gmm.expert_mlp(*args, gmm.choose(kernel, "cpu")), sizes, rows, *others)
    want = value_and_grads(mlp_reference, sizes, *arrays())
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-6)


def test_large_blocks_give_the_numbers_of_small_ones(monkeypatch):
    """On CPU, rows are multiplied in large blocks as far as their group fills those."""
    rows, gate_up, *_ = arrays()
    sizes = jnp.asarray([192, 0, 64, 0, 128], jnp.int32)
    found = []
    for rows_of_large in (64, 128):
        monkeypatch.setattr(blocked_matmul, "LARGE", rows_of_large * gate_up[0].size)
        found.append(jax.jit(functools.partial(blocked_matmul.multiply, transpose=False))(rows, gate_up, sizes))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[1], gmm.reference(rows, gate_up, sizes), atol=2e-6)


def test_rows_of_nobody_may_hold_anything():
    """Rows past the last group neither reach the gradients of the weights nor make them NaN."""
    sizes, (rows, *others) = UNALIGNED["one and padding"], arrays()
    want = value_and_grads(mlp_reference, sizes, rows, *others)
    rows = jnp.where(jnp.arange(Q)[:, None] < sum(sizes), rows, jnp.nan)
    got = value_and_grads(lambda *args: gmm.expert_mlp(*args, Kernel("fused", interpret=True)), sizes, rows, *others)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-6)


@pytest.mark.parametrize("groups", [*GROUPS, *UNALIGNED])
@pytest.mark.parametrize("empty_groups", [False, True])
def test_visits_cover_every_row_of_a_group_once(groups, empty_groups, monkeypatch):
    monkeypatch.setattr(expert_mlp_tpu, "TILE", 64)
    sizes = np.asarray((GROUPS | UNALIGNED)[groups])
    visits = jax.tree.map(np.asarray, expert_mlp_tpu.plan_visits(jnp.asarray(sizes), Q, empty_groups))
    number = int(visits.number[0])
    seen = np.zeros(Q, int)
    for expert, tile in zip(visits.expert[:number], visits.tile[:number]):
        low, high = max(visits.start[expert], 64 * tile), min(visits.end[expert], 64 * tile + 64)
        assert high > low or (empty_groups and sizes[expert] == 0)
        seen[low:high] += 1
    np.testing.assert_array_equal(seen, np.arange(Q) < sizes.sum())
    assert number <= len(visits.expert) and np.all(np.diff(visits.expert[:number]) >= 0)
    assert not empty_groups or set(visits.expert[:number]) == set(range(E))


@pytest.fixture
def one_device():
    with jax.set_mesh(sharding.single_device_mesh()):
        yield


def attend(q, k, v, segments, kernel):
    """As a layer does: its own queries to the keys of whole rows."""
    heads, batch = ("tensor", None), sharding.BATCH
    q, segments = sharding.reshard(q, batch, "sequence", *heads), sharding.reshard(segments, batch, "sequence")
    k, v = (sharding.reshard(a, batch, None, *heads) for a in (k, v))
    return attention.attention(q, k, v, segments, sharding.reshard(segments, batch, None), kernel)


def attention_inputs(heads=2, kv_heads=2, length=256, width=128):
    draw = np.random.default_rng(0)
    array = lambda h: jnp.asarray(draw.normal(size=(2, length, h, width)), jnp.float32)
    segments = jnp.asarray(np.sort(draw.integers(1, 5, (2, length)), axis=1), jnp.int32).at[1, -20:].set(0)
    return array(heads), array(kv_heads), array(kv_heads), segments


@pytest.mark.parametrize("kernel, kv_heads, length", [
    (SPLASH, 2, 256), (SPLASH, 1, 256), (BLOCKED, 1, 256), (BLOCKED, 2, 200), (FLASH, 1, 256), (FLASH, 2, 200)], ids=str)
def test_attention(one_device, kernel, kv_heads, length):
    q, k, v, segments = attention_inputs(kv_heads=kv_heads, length=length)
    seen = (segments > 0)[..., None, None]

    def loss(q, k, v, kernel):
        return jnp.sum(jnp.where(seen, jnp.sin(attend(q, k, v, segments, kernel)), 0))

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    got, want = step(q, k, v, kernel), step(q, k, v, REFERENCE)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("width", [32, 256])
def test_flash_attention_in_bfloat16(one_device, width):
    """Values and gradients of a random projection, against fp32: as near as the plain form in bfloat16 comes."""
    inputs = attention_inputs(kv_heads=1, width=width)
    q, k, v, segments = *(a.astype(jnp.bfloat16) for a in inputs[:3]), inputs[3]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    loss = lambda q, k, v, kernel: jnp.sum(weights * attend(q, k, v, segments, kernel))
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    _, want = step(*(a.astype(jnp.float32) for a in (q, k, v)), REFERENCE)
    error = lambda kernel: [float(jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w))
                            for g, w in zip(step(q, k, v, kernel)[1], want, strict=True)]
    flash, plain = error(FLASH), error(REFERENCE)
    assert all(f <= 1.5 * p < 0.02 for f, p in zip(flash, plain)), f"{flash} against {plain}"


def test_a_document_is_a_range_of_keys():
    segments = attention_inputs()[3]
    starts, at = attention_gpu.document_starts(segments), jnp.arange(segments.shape[1])
    causal = at[:, None] >= at
    np.testing.assert_array_equal(causal & (starts[:, :, None] <= at), causal & (segments[:, :, None] == segments[:, None]))


# tokamax: forward, backward; JAX's own: forward, the sums of out * d_out, backward.
GPU_FORWARD, GPU_KERNELS = ("pallas_flash_attention_fwd", 2) if attention_gpu.TOKAMAX else ("mha_forward", 3)


def test_flash_attention_compiles_to_gpu_kernels():
    """Forward and gradient at the published shape lower to the kernels' Triton programs, on a mesh of eight H100s; XLA
    compiles those on the GPU."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 2, 1), sharding.AXES, (jax.sharding.AxisType.Explicit,) * 5,
                                     abstract_device=device)
    array = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    q, k = (array((4, 4096, 16, 128), jnp.bfloat16, sharding.BATCH, axis, "tensor", None) for axis in ("sequence", None))
    q_segments, k_segments = (array((4, 4096), jnp.int32, sharding.BATCH, axis) for axis in ("sequence", None))
    attend = functools.partial(attention.attention, kernel=Kernel("flash"))
    loss = lambda *args: jnp.sum(attend(*args).astype(jnp.float32))
    with jax.sharding.use_abstract_mesh(mesh):
        lower = lambda f: jax.jit(f).trace(q, k, k, q_segments, k_segments).lower(lowering_platforms=("cuda",)).as_text()
        forward, gradient = lower(attend), lower(jax.grad(loss, (0, 1, 2)))
    for text, kernels in ((forward, 1), (gradient, GPU_KERNELS)):
        assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == kernels


@pytest.mark.parametrize("remat, times", [("full", 2), ("moe", 2), ("attention", 1), ("projections", 1), ("light", 1)])
@pytest.mark.parametrize("kernel, forward", [(Kernel("flash"), GPU_FORWARD), (SPLASH, "fwd")], ids=str)
def test_rematerialisation_keeps_the_attention_that_it_names(one_device, kernel, forward, remat, times):
    """How often the forward kernel runs in a gradient, by policy."""
    q, k, v, segments = attention_inputs()
    layer = jax.checkpoint(lambda q, k, v: jnp.sin(attend(q, k, v, segments, kernel)), policy=REMAT_POLICIES[remat],
                           prevent_cse=False)
    step = jax.value_and_grad(lambda *args: jnp.sum(layer(*args)), (0, 1, 2))
    kernels = [str(e.params["name"]) for e in equations(step, q, k, v) if e.primitive.name == "pallas_call"]
    assert sum(forward in name for name in kernels) == times


@pytest.mark.parametrize("kernel, shape", [(SPLASH, (1, 1, 1, 1, 2)), (SPLASH, (1, 2, 1, 2, 2)), (FLASH, (2, 1, 1, 2, 1)),
                                           (REFERENCE, (1, 1, 1, 1, 2)), (BLOCKED, (1, 2, 1, 2, 2))], ids=str)
def test_attention_on_a_mesh(kernel, shape):
    q, k, v, segments = attention_inputs()
    seen = (segments > 0)[..., None, None]

    def loss(q, k, v, segments, kernel):
        return jnp.sum(jnp.where(seen, jnp.sin(attend(q, k, v, segments, kernel)), 0))

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=4)
    heads = sharding.P(sharding.BATCH, "sequence", "tensor", None)
    args, specs = (q, k, v, segments), (heads, heads, heads, sharding.TOKENS)
    want = run_on_mesh(lambda *args: step(*args, REFERENCE), (1, 1, 1, 1, 1), args, specs)
    got = run_on_mesh(lambda *args: step(*args, kernel), shape, args, specs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 2, 1, 2, 2)], ids=str)
def test_both_forms_of_the_rotary_embedding_are_the_same_numbers(shape, dtype):
    x, d = (jax.random.normal(jax.random.key(i), (4, 16, 4, 32)).astype(dtype) for i in range(2))
    positions = jnp.tile(jnp.arange(16), (4, 1))

    def turned(x, d, positions, by_matmul):
        y, back = jax.vjp(lambda x: rotate(x, rotary_angles(positions, 32, 1e4), by_matmul), x)
        return y, back(d)[0]

    heads = sharding.P(sharding.BATCH, "sequence", "tensor", None)
    args, specs = (x, d, positions), (heads, heads, sharding.TOKENS)
    split, matmul = (run_on_mesh(jax.jit(functools.partial(turned, by_matmul=by)), shape, args, specs) for by in (False, True))
    for g, w in zip(matmul, split, strict=True):
        assert np.array_equal(np.float32(g), np.float32(w)) and not np.array_equal(np.float32(g), np.float32(x))


def test_one_document_does_not_reach_another(one_device):
    q, k, v, segments = attention_inputs()
    first = segments[0] == segments[0, 0]
    other = v.at[0].set(jnp.where(first[:, None, None], 100.0, v[0]))
    for kernel in (SPLASH, FLASH, BLOCKED):
        run = lambda v: np.asarray(attend(q, k, v, segments, kernel))[0][~first]
        np.testing.assert_array_equal(run(v), run(other))


@pytest.mark.parametrize("platform", ["cpu", "others"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 2, 2, 1, 1), (1, 2, 1, 2, 2)])
def test_cross_entropy(shape, platform, monkeypatch):
    if platform == "others":  # what TPUs and GPUs compute
        monkeypatch.setattr(cross_entropy.lax, "platform_dependent", lambda *args, default, **others: default(*args))
    draw = np.random.default_rng(0)
    x, head = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((8, 16, 32), (32, 64)))
    targets, weights = jnp.asarray(draw.integers(0, 64, (8, 16)), jnp.int32), jnp.asarray(draw.random((8, 16)), jnp.float32)

    def plain(x, head, targets, weights):
        logits = x @ head
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return 0.3 * jnp.sum(weights * (nll + 0.1 * lse**2))

    def training(x, head, targets, weights):
        sums = cross_entropy.training_loss(x, head, targets, weights, 0.1, 16)
        return 0.3 * sums.objective

    def by_token(x, head, targets, weights):
        nll, lse = cross_entropy.cross_entropy(x, head, targets, 16)
        return 0.3 * jnp.sum(weights * (nll + 0.1 * lse**2))

    want = jax.value_and_grad(plain, (0, 1))(x, head, targets, weights)
    for loss in (training, by_token):
        specs = (sharding.ACTIVATIONS, sharding.parameter_spec(("head",)), sharding.TOKENS, sharding.TOKENS)
        got = run_on_mesh(jax.jit(jax.value_and_grad(loss, (0, 1))), shape, (x, head, targets, weights), specs)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-5)


def run_on_mesh(step, shape, args, specs):
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 5,
                         devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        return step(*(jax.device_put(a, jax.sharding.NamedSharding(mesh, s)) for a, s in zip(args, specs)))


def test_choices():
    for choose, kernels in ((gmm.choose, ("fused", "batched", "blocked")), (attention.choose, ("splash", "flash", "blocked"))):
        assert [choose("auto", platform) for platform in ("tpu", "gpu", "cpu")] == [Kernel(name) for name in kernels]
    assert str(gmm.choose("fused", "cpu")) == "fused_interpret"
    assert attention.choose("splash", "cpu") == SPLASH and attention.choose("flash", "cpu") == FLASH
    for choose in (gmm.choose, attention.choose):
        with pytest.raises(InputError, match="must be auto or one of"):
            choose("best", "cpu")


@pytest.mark.parametrize("head_dim, sequence, field", [(8, 1, "model.head_dim"), (128, 2, "mesh.sequence")])
def test_a_slow_path_names_itself(head_dim, sequence, field, caplog):
    attention.choose.cache_clear()
    with caplog.at_level("INFO"):
        assert attention.choose("auto", "gpu", head_dim, sequence) == BLOCKED
    assert f"blocked in place of flash, which needs {field}" in caplog.text and "blocked is slow on gpu" in caplog.text
