"""Experts that work together on one shard: found where they are known, measured on other text, and the same function."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_analysis import DOCUMENTS, activations
from test_study import command
from tiny import config as tiny_shape
from tiny_run import tiny_config

from emo_jax.analysis import placement
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.config import MeshConfig
from emo_jax.errors import InputError
from emo_jax.loaded import load
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


def test_traffic_is_what_the_choices_say():
    a = activations(lambda label, token: 2 * label + token % 2)
    a = dataclasses.replace(a, expert_ids=np.concatenate([a.expert_ids, (a.expert_ids + 1) % 8], axis=2))
    config = tiny_shape(model=dict(num_experts=8, num_shared_experts=0, top_k=2))
    placed = placement.Placement(4, np.tile([7, 0, 1, 2, 3, 4, 5, 6], (2, 1)))
    found, shard = placement.traffic(a, placed, config), placed.shard_of(config)
    per_token = [[len({int(shard[layer][e]) for e in ids}) for ids in a.expert_ids[:, layer]] for layer in range(2)]
    assert found["shards"].drawn[0] == pytest.approx(np.mean(per_token, axis=1))
    crossing = np.zeros(2)
    for layer in range(2):
        for d in range(DOCUMENTS):
            at = slice(a.text.starts[d], a.text.starts[d + 1])
            counts = np.bincount(shard[layer][a.expert_ids[at, layer]].ravel(), minlength=4)
            crossing[layer] += (1 - counts.max() / counts.sum()) / DOCUMENTS
    assert found["crossing_home"].drawn[0] == pytest.approx(crossing)
    loads = [np.bincount(shard[layer][a.expert_ids[:, layer]].ravel(), minlength=4) for layer in range(2)]
    assert found["busiest"].drawn[0] == pytest.approx([x.max() / x.mean() for x in loads])
    best = placement.choose_placement(a, config, 4)
    after = placement.traffic(a, best, config)
    assert np.all(after["shards"].drawn[0] <= found["shards"].drawn[0] + 1e-9) and np.all(after["busiest"].drawn[0] < 1.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placed")
    train(tiny_config(folder, "--train.steps=20", "--data.eval_fraction=0.3"), folder / "run")
    return folder / "run"


def test_a_placed_model_is_the_same_function(run, tmp_path):
    status, result, _ = command("place", run, "--shards", "2", "--tokens", "1000", "--out", tmp_path / "placed")
    assert status == 0 and set(result["measures"]) == {"crossing_home", "shards", "busiest"}
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
    sharded = load(str(tmp_path / "placed"), mesh=MeshConfig(data=-1, fsdp=1, expert=2))
    assert sharded.mesh.shape["expert"] == 2 and jax.device_count() == 8
    assert sharded.logits(tokens) == pytest.approx(before.logits(tokens), abs=2e-5)


def test_training_goes_on_from_a_placed_model_and_old_subsets_are_refused(run, tmp_path):
    order = np.stack([np.roll(np.arange(7), 3), np.arange(7)[::-1]])
    permute(str(run), order, tmp_path / "placed")
    fields = ("--train.steps=2", "--data.eval_fraction=0.3", f"--data.tokenizer={run}/tokenizer.json")
    for name, origin in (("old", run), ("new", tmp_path / "placed")):
        train(tiny_config(run.parent, *fields, f"--train.init_params_from={origin}"), tmp_path / name)
    first, again = ([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
                     if "loss" in json.loads(line) and "eval" not in json.loads(line)] for name in ("old", "new"))
    assert again == pytest.approx(first, abs=1e-4) and len(first) == 2
    documents = run.parent / "documents.jsonl"
    assert command("select", run, "--calibration", documents, "--keep", "4", "--out", tmp_path / "s.json")[0] == 0
    status, result, _ = command("eval", tmp_path / "placed", "--subset", tmp_path / "s.json")
    assert status == 2 and "s.json" in result["error"]
    with pytest.raises(InputError, match="each of the 7 routed experts once"):
        permute(str(run), np.zeros((2, 7), int), tmp_path / "x")
