"""Subsets on disk: extracted, loaded alone, merged back, extended."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from tiny_run import tiny_config

from emo_jax import compat, sharding
from emo_jax.checkpoints import rewrite
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import Subset
from emo_jax.config import MeshConfig
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel, load
from emo_jax.moe import routing
from emo_jax.surgery import extract, merge
from emo_jax.surgery.extend import extend
from emo_jax.surgery.load import load_subset
from emo_jax.train.loop import train

EXPERTS, D, F = 32, 64, 96
SHAPE = [f"--model.num_experts={EXPERTS}", f"--model.d_model={D}", f"--model.d_ff={F}", "--router.pool_max=31",
         "--train.steps=1", "--data.eval_fraction=0.3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(tiny_config(folder, *SHAPE), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def whole(run):
    return open_checkpoint(run)


@pytest.fixture(scope="module")
def opened(run):
    return load(str(run))


def subset_of(*kept):
    return Subset(tuple(map(tuple, kept)), EXPERTS - 1, 1, "test")


EVEN = subset_of([0, 5, 30], [1, 2, 9])
UNEVEN = subset_of([3, 7, 8, 11], [0, 20])


def losses(opened: LoadedModel, allowed=None):
    source = open_source(opened.config.data)
    return opened.evaluation(source, np.arange(20)).losses(opened.params, allowed)[0]


def leaves(params):
    return {".".join(k.key for k in path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("subset", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_the_extracted_model_is_the_masked_model(whole, opened, tmp_path, subset):
    extract.extract(whole, subset, tmp_path / "small")
    small = load(str(tmp_path / "small"))
    assert small.config.model.num_experts == max(subset.experts_per_layer) and small.checkpoint.meta["made"]["of"]["step"] == 1
    np.testing.assert_allclose(losses(small), losses(opened, subset.mask()), rtol=2e-5)
    with pytest.raises(InputError, match="already holds a checkpoint"):
        extract.extract(whole, subset, tmp_path / "small")


@pytest.mark.parametrize("subset", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_loading_a_subset_equals_extracting_it(whole, tmp_path, subset):
    extract.extract(whole, subset, tmp_path / "small")
    small = open_checkpoint(tmp_path / "small")
    mesh = sharding.single_device_mesh()
    with compat.set_mesh(mesh):
        want = leaves(small.restore_params(mesh))
    config, params = load_subset(whole, subset)
    assert config == small.config
    for name, got in leaves(params).items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)


def test_loading_onto_a_mesh_gives_the_same_arrays(whole):
    config, want = load_subset(whole, EVEN)
    sharded = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    _, got = load_subset(whole, EVEN, sharding.make_mesh(sharded))
    for name, array in leaves(got).items():
        np.testing.assert_array_equal(array, leaves(want)[name], err_msg=name)
    assert got["layers"]["moe"]["gate"].sharding.spec == sharding.parameter_spec(("layers", "moe", "gate"))


def bytes_read():
    return sum(v["value"] for m in ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
               for v in m["values"])


def test_only_the_kept_experts_are_read(whole):
    """12.5 % of the experts cost at most 15 % of the bytes of the expert tables."""
    def tables(rows):
        store, before = rewrite.store_of(whole), bytes_read()
        for leaf in rewrite.TABLES:
            for part in store.read_many(leaf, [(layer, row) for layer in range(2) for row in rows]):
                assert part.shape == ((D, F) if leaf[-1] != "down" else (F, D))
        return bytes_read() - before

    everything = tables(range(EXPERTS))
    assert everything > 0.8 * 2 * EXPERTS * 3 * D * F * 4  # fp32 of random numbers hardly compresses
    assert tables([0, 5, 30, 31]) <= 0.15 * everything
    before = bytes_read()
    _, params = load_subset(whole, EVEN)
    rest = 4 * sum(a.size for name, a in leaves(params).items() if ".moe." not in name)
    assert bytes_read() - before <= 0.15 * everything + 1.3 * rest


def test_a_subset_of_other_parameters_is_refused(whole, opened):
    other = dataclasses.replace(EVEN, model={"name": "x", "step": 3, "hash": "0" * 16})
    with pytest.raises(InputError, match="was chosen for x step 3"):
        load_subset(whole, other)
    load_subset(whole, dataclasses.replace(EVEN, model=opened.identity()))


def changed(found, out, subset):
    """The extracted subset with all its parameters 1 larger."""
    values = extract.kept_values(found, subset)
    return rewrite.write_checkpoint(out, extract.subset_config(found.config, subset),
                                    lambda leaf, index: values(leaf, index) + 1, found, {})


@pytest.mark.parametrize("subset", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_merging_back_changes_what_was_asked_for_only(whole, tmp_path, subset):
    changed(whole, tmp_path / "part", subset)
    part, mesh = open_checkpoint(tmp_path / "part"), sharding.single_device_mesh()

    def merged(name, **options):
        merge.merge(whole, part, subset, tmp_path / name, **options)
        with compat.set_mesh(mesh):
            return leaves(open_checkpoint(tmp_path / name).restore_params(mesh))

    with compat.set_mesh(mesh):
        old = leaves(whole.restore_params(mesh))
    mask = subset.mask()
    for options in ({}, {"alpha": 0.25}, {"router": True}, {"shared": True, "router": True}):
        new = merged("merged" + "".join(options), **options)
        step = options.get("alpha", 1.0)
        for name in old:
            want = old[name].copy()
            if name.startswith("layers.moe") and name != "layers.moe.router":
                want[:, :-1][mask] += step
                want[:, -1] += step * options.get("shared", False)
            elif name == "layers.moe.router":
                want += step * options.get("router", False) * mask[:, None]
            else:
                want += step * options.get("shared", False)
            np.testing.assert_allclose(new[name], want, atol=1e-6, err_msg=f"{name} {options}")
    with pytest.raises(InputError, match="experts in its layers"):
        merge.merge(whole, part, subset_of([0, 1], [1, 2]), tmp_path / "no")
    with pytest.raises(InputError, match="--alpha -1"):
        merge.merge(whole, part, subset, tmp_path / "no", alpha=-1)


def test_extending_keeps_the_old_experts_and_copies_share_their_work(whole, opened, tmp_path):
    extend(whole, 4, tmp_path / "copy", init="copy")
    larger = load(str(tmp_path / "copy"))
    assert larger.config.model.num_experts == EXPERTS + 4 and larger.config.router.forced_experts == 4
    old, new = leaves(opened.params), leaves(larger.params)
    for name in ("gate", "up", "down"):
        table = new[f"layers.moe.{name}"]
        kept = np.delete(table, range(EXPERTS - 1, EXPERTS + 3), axis=1)
        np.testing.assert_array_equal(kept, old[f"layers.moe.{name}"])
    without = np.ones((2, EXPERTS + 3), bool)
    without[:, EXPERTS - 1:] = False
    np.testing.assert_allclose(losses(larger, without), losses(opened), rtol=1e-6)
    extend(whole, 4, tmp_path / "fresh", init="fresh", forced=False)
    fresh = load(str(tmp_path / "fresh"))
    assert fresh.config.router.forced_experts == 0
    added = leaves(fresh.params)["layers.moe.gate"][:, EXPERTS - 1:EXPERTS + 3]
    assert 0.5 < added.std() / fresh.config.model.init_std < 1.5
    with pytest.raises(InputError, match="--experts 0"):
        extend(whole, 0, tmp_path / "no")


def test_forced_experts_are_in_every_pool_on_top_of_its_size():
    probs = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(10), (2, 6)), jnp.float32)
    segments, sizes = jnp.array([[1, 1, 1, 2, 2, 2]] * 2), jnp.array([[3, 8], [5, 10]])
    pool = np.asarray(routing.document_pool(probs, segments, sizes, forced_experts=2))
    assert pool[..., 8:].all()
    assert (pool[..., :8].sum(-1) == np.minimum(np.repeat(sizes, 3, axis=1), 8)).all()
    # The others are chosen as if the forced ones were not there.
    alone = np.asarray(routing.document_pool(probs[..., :8], segments, jnp.minimum(sizes, 8)))
    assert (pool[..., :8] == alone).all()


def test_a_damaged_chunk_is_reported_not_loaded(whole, tmp_path):
    extract.extract(whole, EVEN, tmp_path / "small")
    for file in (tmp_path / "small" / "checkpoints" / "0" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    small = open_checkpoint(tmp_path / "small")
    with pytest.raises(InputError, match="cannot be read"):
        load_subset(small, Subset(((0, 1), (0, 1)), 3, 1, "test"))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model"]["num_experts"] == 4
