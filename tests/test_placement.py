"""Experts that work together on one shard: found where they are known, measured on other text, and the same function."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_analysis import DOCUMENTS, activations
from test_study import command
from tiny import config as tiny_shape
from tiny_run import tiny_config

from emo_jax.analysis import placement, traffic
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.config import DataConfig, MeshConfig
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError
from emo_jax.loaded import load
from emo_jax.moe.dispatch_all_to_all import plan_exchange
from emo_jax.surgery.permute import permute
from emo_jax.train.loop import train


def test_planted_modules_come_together_whatever_their_numbers():
    draw = np.random.default_rng(0)
    module = draw.permutation(np.repeat(np.arange(4), 4))
    together = np.where(module[:, None] == module, 50, 3) + np.diag(np.full(16, 100))
    found = placement.assign(together.astype(float), np.full(4, 4))
    assert all(len(set(found[module == g])) == 1 for g in range(4))
    uneven = placement.assign(together.astype(float), np.array([5, 4, 4, 3]))
    assert np.bincount(uneven).tolist() == [5, 4, 4, 3]


def test_a_shard_is_not_overloaded_for_the_sake_of_pairs():
    """The four busy experts work together, but one shard must not do all the work."""
    load = np.array([100.0] * 4 + [10.0] * 4)
    together = np.diag(load)
    together[:4, :4] += 30 * (1 - np.eye(4))
    loads = lambda limit: np.bincount(placement.assign(together, np.array([4, 4]), limit), load)
    assert sorted(loads(10.0)) == [40, 400] and loads(1.1).max() <= 1.1 * 220


def test_shards_are_those_of_the_expert_table():
    config = tiny_shape()  # 16 experts, the last one shared
    assert placement.capacities(config, 4).tolist() == [4, 4, 4, 3]
    shard = placement.Placement.as_it_is(config, 4).shard_of(config)
    assert shard[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3
    for wrong in (3, 16):
        with pytest.raises(InputError, match=f"--shards {wrong} must divide the 16 experts"):
            placement.capacities(config, wrong)


def test_shards_of_a_layer_are_named_as_those_of_other_layers():
    """Each layer's modules are the same documents' under other names; the last shard is smaller and keeps its name."""
    draw = np.random.default_rng(0)
    home = np.arange(60) % 3
    renamed = [np.array([0, 1, 2, 3]), np.array([2, 0, 1, 3]), np.array([1, 2, 0, 3])]
    choices = draw.integers(0, 3, (60, 3, 4))
    for layer, names in enumerate(renamed):
        choices[np.arange(60), layer, names[home]] += 20
    found = placement.align(choices, np.array([4, 4, 4, 3]))
    assert np.all(found[:, 3] == 3)
    assert all(len({int(found[layer, renamed[layer][h]]) for layer in range(3)}) == 1 for h in range(3))


def choices_of(expert_of) -> placement.Choices:
    """Two experts a token: that of `activations`, and the next."""
    a = activations(expert_of)
    return placement.Choices(a.text, np.concatenate([a.expert_ids, (a.expert_ids + 1) % 8], axis=2))


CONFIG = tiny_shape(model=dict(num_experts=8, num_shared_experts=0, top_k=2))


def test_traffic_is_what_the_choices_say():
    a = choices_of(lambda label, token: 2 * label + token % 2)
    placed = placement.Placement(4, np.tile([7, 0, 1, 2, 3, 4, 5, 6], (2, 1)))
    found, shard = traffic.traffic(a, placed, CONFIG), placed.shard_of(CONFIG)
    of_token = np.stack([shard[layer][a.expert_ids[:, layer]] for layer in range(2)], axis=1)  # [n, L, k]
    assert found["shards"].drawn[0] == pytest.approx((1 + (of_token[..., 0] != of_token[..., 1])).mean(axis=0))
    loads = [np.bincount(of_token[:, layer].ravel(), minlength=4) for layer in range(2)]
    assert found["busiest"].drawn[0] == pytest.approx([x.max() / x.mean() for x in loads])
    assert found["busiest_of_batch"].drawn[0] == pytest.approx(found["busiest"].drawn[0])  # fewer than a batch
    order = np.random.default_rng(0).permutation(DOCUMENTS)
    dealt = np.argsort(order) % 4
    home = traffic.homes(a.by_shard(shard, 4)[0].sum(axis=1), order)
    assert np.bincount(home).tolist() == [DOCUMENTS // 4] * 4
    for name, where in (("", dealt), ("_at_home", home)):
        away = of_token != where[a.text.documents][:, None, None]
        assert found[f"crossing{name}"].drawn[0] == pytest.approx(away.mean(axis=(0, 2)))
        copies = away.any(axis=2) * (1 + (away.all(axis=2) & (of_token[..., 0] != of_token[..., 1])))
        assert found[f"copies{name}"].drawn[0] == pytest.approx(copies.mean(axis=0))


def test_rows_that_all_to_all_sends_to_other_devices_are_the_choices_that_cross():
    a = choices_of(lambda label, token: 2 * label + token % 2)
    placed = placement.choose_placement(a, CONFIG, 4)
    new_id = np.argsort(placed.order, axis=1)
    home = traffic.homes(a.by_shard(placed.shard_of(CONFIG), 4)[0].sum(axis=1), np.random.default_rng(0).permutation(DOCUMENTS))
    found = traffic.traffic(a, placed, CONFIG)["crossing_at_home"].drawn[0]
    for layer in range(2):
        ids = new_id[layer][a.expert_ids[:, layer]]
        counts = np.stack([np.bincount(ids[home[a.text.documents] == device].ravel(), minlength=8) for device in range(4)])
        sent = [np.delete(plan_exchange(jnp.asarray(counts), jnp.asarray(device), 1).there.send_sizes.reshape(4, 2).sum(axis=1),
                          device).sum() for device in range(4)]
        assert sum(sent) / ids.size == pytest.approx(found[layer])


def test_documents_with_experts_of_their_own_stay_on_their_shard():
    """Four labels with two experts each, scattered over the table: nothing needs to leave a shard, in any layer."""
    scattered = np.array([3, 7, 0, 5, 2, 6, 1, 4])
    a = activations(lambda label, token: label)
    label = a.text.labels[a.text.documents]
    pair = scattered[np.stack([2 * label, 2 * label + 1], axis=1)]
    a = placement.Choices(a.text, np.stack([pair, (pair + 3) % 8], axis=1))
    _, found = traffic.compare(a, a, CONFIG, 4)
    assert found["crossing_at_home"]["after"]["value"] == 0 < found["crossing_at_home"]["before"]["value"]
    assert found["shards"]["after"]["value"] == 1 < found["shards"]["before"]["value"]
    assert found["busiest"]["after"]["value"] == 1


def test_text_that_chooses_does_not_measure(tmp_path):
    path = tmp_path / "d.jsonl"
    documents = [(f"text {i}", "ab"[i % 2]) for i in range(20)] + [("text 0", "c"), ("text 1", "c")]
    path.write_text("".join(json.dumps({"text": text, "source": label}) + "\n" for text, label in documents))
    source = open_source(DataConfig(path=str(path)))
    choosing, measuring = placement.two_parts(source, np.arange(22), 0.4)
    labels = [source.label(int(i)) for i in choosing]
    assert [labels.count(label) for label in "abc"] == [4, 4, 1]
    contents = [{source[int(i)].text for i in part} for part in (choosing, measuring)]
    assert not contents[0] & contents[1] and len(measuring) >= 11
    with pytest.raises(InputError, match="another --choose-share"):
        placement.two_parts(source, np.arange(2), 0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placed")
    train(tiny_config(folder, "--train.steps=20", "--data.eval_fraction=0.3"), folder / "run")
    return folder / "run"


def test_a_placed_model_is_the_same_function(run, tmp_path):
    status, result, _ = command("place", run, "--shards", "2", "--tokens", "1000", "--out", tmp_path / "placed")
    assert status == 0 and min(result["documents"]) > 0 and result["out"]
    assert result["measures"]["shards"]["after"]["value"] <= result["measures"]["shards"]["before"]["value"] + 0.05
    before, after = load(str(run)), load(str(tmp_path / "placed"))
    order = np.array(open_checkpoint(tmp_path / "placed").meta["made"]["order"])
    assert order.shape == (2, 7) and not np.array_equal(order, np.sort(order, axis=1))
    tokens = np.random.default_rng(0).integers(0, 300, (4, 32))
    # The experts' outputs of a token are added in another order.
    assert after.logits(tokens) == pytest.approx(before.logits(tokens), abs=2e-5)
    texts = ["red green blue gray pink", "one two six ten"]
    for old, new in zip(before.router_probabilities(texts), after.router_probabilities(texts)):
        for layer in range(2):
            assert new[:, layer] == pytest.approx(old[:, layer][:, order[layer]], abs=1e-6)
    assert after.loss(texts) == pytest.approx(before.loss(texts), abs=1e-5)
    for dispatch in ("ring", "all_to_all"):
        sharded = load(str(tmp_path / "placed"), [f"--kernels.dispatch={dispatch}"], mesh=MeshConfig(data=-1, fsdp=1, expert=2))
        assert sharded.mesh.shape["expert"] == 2 and jax.device_count() == 8
        assert sharded.logits(tokens) == pytest.approx(before.logits(tokens), abs=2e-5)
        assert sharded.loss(texts) == pytest.approx(before.loss(texts), abs=1e-5)
    status, result, _ = command("place", run, "--shards", "2", "--tokens", "1000", "--out", tmp_path / "placed")
    assert status == 2 and "already holds a checkpoint" in result["error"]


def test_training_goes_on_from_a_placed_model_and_old_subsets_are_refused(run, tmp_path):
    order = np.stack([np.roll(np.arange(7), 3), np.arange(7)[::-1]])
    permute(str(run), order, tmp_path / "placed")
    permute(str(tmp_path / "placed"), order, tmp_path / "again")
    made = [open_checkpoint(path) for path in (run, tmp_path / "placed", tmp_path / "again")]
    assert len({c.meta["checksums"]["params"]["sum"] for c in made}) == 1 and len({c.hash for c in made}) == 3
    fields = ("--train.steps=2", "--data.eval_fraction=0.3", f"--data.tokenizer={run}/tokenizer.json")
    for name, origin in (("old", run), ("new", tmp_path / "placed")):
        train(tiny_config(run.parent, *fields, f"--train.init_params_from={origin}"), tmp_path / name)
    first, again = ([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
                     if "loss" in json.loads(line) and "eval" not in json.loads(line)] for name in ("old", "new"))
    assert again == pytest.approx(first, abs=1e-4) and len(first) == 2
    documents = run.parent / "documents.jsonl"
    assert command("select", run, "--calibration", documents, "--keep", "4", "--out", tmp_path / "s.json")[0] == 0
    status, result, _ = command("eval", tmp_path / "placed", "--subset", tmp_path / "s.json")
    assert status == 2 and "s.json was chosen for" in result["error"] and "choose one for this checkpoint" in result["error"]
    with pytest.raises(InputError, match="each of the 7 routed experts once"):
        permute(str(run), np.zeros((2, 7), int), tmp_path / "x")
