"""Training a module inside the whole model, so that the whole model keeps what it learns."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_study import command
from tiny_run import tiny_config

from emo_jax import config as config_lib
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.data.order import split
from emo_jax.errors import InputError
from emo_jax.loaded import load
from emo_jax.study import transfer_report
from emo_jax.study.arms import ARMS
from emo_jax.surgery import coefficient
from emo_jax.surgery.extend import extend
from emo_jax.surgery.extract import extract
from emo_jax.surgery.finetune import finetune
from emo_jax.surgery.merge import merge
from emo_jax.train.batches import DocumentsOfPhases, TextBatches
from emo_jax.train.loop import train

MODULE = ((0, 3, 5), (1, 2, 6))
QUICK = ["train.steps=2", "train.batch_size=16", "optimizer.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    train(tiny_config(folder, "--train.steps=20", "--data.eval_fraction=0.3"), folder / "emo" / "0")
    return folder / "emo" / "0"


@pytest.fixture(scope="module")
def module(run):
    subset = full(open_checkpoint(run).config)
    scores = tuple(tuple(float(r in ids) + r / 100 for r in range(7)) for ids in MODULE)
    return dataclasses.replace(subset, kept=MODULE, method="router", scores=scores)


def tuned(run, module, out, *fields):
    """Without the penalty on the divergence, unless `fields` have it."""
    finetune(open_checkpoint(run), module, out, overrides=[*QUICK, "train.divergence_weight=0", *fields], label="color")


def records(out):
    """Of the steps, in metrics.jsonl."""
    return [r for line in (out / "metrics.jsonl").read_text().splitlines() if "loss_tokens" in (r := json.loads(line))]


def parts(path):
    return jax.tree.map(np.asarray, load(path).params)


def test_only_the_module_s_experts_and_router_columns_move(run, module, tmp_path):
    tuned(run, module, tmp_path / "tuned", "optimizer.trainable=module")
    before, after = parts(run), parts(tmp_path / "tuned")
    inside = module.mask()
    for name in ("gate", "up", "down"):
        moved = (before["layers"]["moe"][name] != after["layers"]["moe"][name]).any(axis=(2, 3))
        assert moved.any(axis=1).all() and not moved[~np.pad(inside, ((0, 0), (0, 1)))].any()  # the shared expert is last
    moved = (before["layers"]["moe"]["router"] != after["layers"]["moe"]["router"]).any(axis=1)
    assert moved.any(axis=1).all() and not moved[~inside].any()
    for tree in (before, after):
        del tree["layers"]["moe"]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_merging_adds_a_multiple_of_what_was_learnt_and_leaves_the_rest_bit_for_bit(run, module, tmp_path):
    tuned(run, module, tmp_path / "tuned", "data.general_every=0", "optimizer.trainable=module")
    for alpha in (0.5, 1.5):
        merge(open_checkpoint(run), open_checkpoint(tmp_path / "tuned"), module, tmp_path / str(alpha), alpha=alpha)
        whole, learnt, merged = (parts(p) for p in (run, tmp_path / "tuned", tmp_path / str(alpha)))
        np.testing.assert_allclose(merged["layers"]["moe"]["gate"], whole["layers"]["moe"]["gate"] + alpha * (
            learnt["layers"]["moe"]["gate"] - whole["layers"]["moe"]["gate"]), atol=1e-6)
        np.testing.assert_array_equal(merged["head"], whole["head"])
        np.testing.assert_array_equal(merged["layers"]["moe"]["up"][0, 1], whole["layers"]["moe"]["up"][0, 1])
    assert open_checkpoint(tmp_path / "1.5").config == open_checkpoint(run).config  # of a whole model without a module


def test_the_coefficient_is_chosen_on_held_out_text(run, module, tmp_path):
    file = tmp_path / "module.json"
    dataclasses.replace(module, model={}).save(file)
    tuned(run, module, tmp_path / "tuned", "optimizer.trainable=all", "train.steps=6")
    status, result, _ = command("subset", "merge", run, "--part", tmp_path / "tuned", "--out", tmp_path / "merged",
                                "--alpha", "auto", "--label", "color")
    assert status == 0 and [t["alpha"] for t in result["tried"]] == list(coefficient.ALPHAS)
    allowed = [t for t in result["tried"] if t["others"] <= coefficient.TOLERANCE * t["gain"]] or result["tried"][:1]
    assert result["alpha"] == max(allowed, key=lambda t: t["gain"])["alpha"]
    chosen = next(t for t in result["tried"] if t["alpha"] == result["alpha"])
    assert result["subsets"][0]["labels"]["color"]["difference"] == pytest.approx(-chosen["gain"], abs=1e-4)
    assert not (tmp_path / "merged" / "alpha_1").exists()
    chosen = dataclasses.replace(module, model=open_checkpoint(run).identity())
    extract(tmp_path / "merged", chosen, tmp_path / "small")  # though its parameters are others now
    small, merged, text = load(tmp_path / "small"), load(tmp_path / "merged"), ["red green blue red"]
    np.testing.assert_allclose(small.loss(text), merged.loss(text, subset=chosen), rtol=1e-5)
    with pytest.raises(InputError, match="was chosen for"):
        extract(tmp_path / "tuned", chosen, tmp_path / "no")
    status, result, _ = command("subset", "merge", run, "--part", tmp_path / "tuned", "--out", tmp_path / "no",
                                "--alpha", "auto")
    assert status == 2 and "give --label" in result["error"]


def test_every_pool_holds_the_module_and_general_documents_have_none(run, module, tmp_path):
    tuned(run, module, tmp_path / "tuned", "router.pool_max=0", "data.general_every=0")
    assert {size for record in records(tmp_path / "tuned") for size in record["pool_size_mean"]} == {3}
    tuned(run, module, tmp_path / "half", "router.pool_max=0", "data.general_every=2")
    assert 4.5 < np.mean([record["pool_size_mean"] for record in records(tmp_path / "half")]) < 5.5  # 3 and all 7


def test_every_so_manieth_row_is_of_general_documents(run, module, tmp_path):
    found = open_checkpoint(run).config
    config = config_lib.override(found, ["data.leave_out_labels=count", "data.general_leave_out_labels=color",
                                         f"data.general_path={found.data.path}", "data.general_every=4"])
    for batch_size in (8, 4):
        c = config_lib.override(config, [f"train.batch_size={batch_size}"])
        documents = DocumentsOfPhases(run).of(c)
        batches, source = TextBatches(c, documents, (0, 1), None), documents.source
        seen = {"color": set(), "count": set()}
        for batch in (next(batches) for _ in range(40)):
            labels = {row: {source.label(i) for i in ids[segments > 0]} for row, (ids, segments) in
                      enumerate(zip(batch["document_ids"], batch["segment_ids"]))}
            assert labels == {row: {"color" if row % 4 else "count"} for row in range(batch_size)}
            np.testing.assert_array_equal(batch["general"], (np.arange(batch_size) % 4 == 0)[:, None] * np.ones((1, 32)))
            seen["count"] |= set(batch["document_ids"][::4].ravel())
            seen["color"] |= set(batch["document_ids"][1:4].ravel())
        batches.close()
        held_out = set(split(documents.evaluated, found.data, found.seed)[1].tolist())
        general = {i - source.first_general for i in seen["count"]}
        assert len(general) > 30 and not general & held_out  # that run held them out of its own documents


def test_a_penalty_on_the_divergence_holds_the_model_on_general_text(run, module, tmp_path):
    moved = {}
    for weight in ("0", "30"):
        out = tmp_path / weight
        tuned(run, module, out, "data.general_every=2", f"train.divergence_weight={weight}", "train.steps=8",
              "optimizer.trainable=all", "optimizer.learning_rate=3e-3")
        tokens = load(run).tokenizer.encode("one two six ten one two")
        moved[weight] = abs(load(run).logits(tokens) - load(out).logits(tokens)).mean()
    assert moved["30"] < moved["0"]
    found = [record["divergence"] for record in records(tmp_path / "30")]
    assert found[-1] > 1e-4 > found[0] > -1e-4


def test_the_divergence_goes_on_from_the_same_model_after_a_stop(run, module, tmp_path):
    fields = ["data.general_every=2", "train.divergence_weight=3", "optimizer.schedule=constant", "checkpoint.every=2"]
    tuned(run, module, tmp_path / "once", *fields, "train.steps=4", "optimizer.warmup_steps=0")
    tuned(run, module, tmp_path / "twice", *fields, "optimizer.warmup_steps=0")
    tuned(run, module, tmp_path / "twice", *fields, "train.steps=4", "optimizer.warmup_steps=0")
    assert jax.tree.all(jax.tree.map(np.array_equal, parts(tmp_path / "once"), parts(tmp_path / "twice")))


def test_moments_of_pretraining_are_carried_over(run, module, tmp_path, capsys):
    fields = ["data.general_every=0", "optimizer.learning_rate=1e-3", "train.steps=1"]
    tuned(run, module, tmp_path / "fresh", *fields)
    tuned(run, module, tmp_path / "carried", *fields, "train.init_moments=true")
    steps = [np.abs(parts(tmp_path / name)["layers"]["moe"]["gate"] - parts(run)["layers"]["moe"]["gate"]).max()
             for name in ("fresh", "carried")]
    assert steps[1] < 0.9 * steps[0]  # a first step of a fresh Adam is the learning rate everywhere
    merge(open_checkpoint(run), open_checkpoint(tmp_path / "fresh"), module, tmp_path / "merged")
    with pytest.raises(InputError, match="holds parameters only"):
        finetune(open_checkpoint(tmp_path / "merged"), dataclasses.replace(module, model={}), tmp_path / "no",
                 overrides=[*QUICK, "train.divergence_weight=0", "train.init_moments=true"], label="color")


def test_experts_made_of_the_two_most_used_ones(run, module, tmp_path):
    path = extend(open_checkpoint(run), 2, tmp_path / "more", init="most_used", noise=0.0, subset=module)
    old, new = parts(run)["layers"]["moe"], parts(path)["layers"]["moe"]
    for layer, ids in enumerate(MODULE):
        np.testing.assert_allclose(new["gate"][layer, 7], old["gate"][layer, list(ids[1:])].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(new["router"][layer, :, 8], old["router"][layer, :, list(ids[1:])].mean(axis=0), rtol=1e-6)
    with pytest.raises(InputError, match="most_used needs --subset"):
        extend(open_checkpoint(run), 2, tmp_path / "other", init="most_used")


@pytest.mark.parametrize("fields, message", [
    (["router.module=0 1;9 2"], "ids of routed experts"), (["router.module=0 1"], "each of 2 layers"),
    (["router.module=0 1;2 3", "router.document_pool=false"], "needs router.document_pool"),
    (["optimizer.trainable=module"], "needs router.module"), (["train.divergence_weight=1"], "needs data.general_every"),
    (["train.init_moments=true"], "needs train.init_params_from"), (["data.general_every=1"], "at least 2"),
    (["data.general_every=3"], "divide train.batch_size=8"),
    (["data.general_every=2", "train.divergence_weight=1", "train.microbatches=2"], "train.microbatches=1")])
def test_what_does_not_go_together_is_named(run, fields, message):
    with pytest.raises(InputError, match=message):
        config_lib.override(open_checkpoint(run).config, fields)


def test_the_study_of_transfer(run, tmp_path):
    study = run.parents[1]
    few = "alone_experts,module_general,appended,whole_divergence,alone_all"
    argv = ("study", "adapt", run, "--label", "color", "--keep", 4, "--out", tmp_path / "emo" / "0" / "color",
            "--train.steps=2", "--train.batch_size=32", "--train.log_every=1")
    status, result, _ = command(*argv, "--arms", few)
    assert status == 0 and [r["arm"] for r in result["arms"]] == few.split(",")
    for r in result["arms"]:
        assert r["full"] == pytest.approx(r["before"]["full"]["color"] - r["after"]["full"]["color"])
        assert r["others"] == pytest.approx(r["after"]["full"]["count"] - r["before"]["full"]["count"])
    assert result["arms"][0]["others"] != 0 and not list((tmp_path / "emo" / "0" / "color").glob("*/"))
    assert command(*argv, "--arms", few)[1]["arms"] == result["arms"]  # nothing is done again
    compared = transfer_report.compare(tmp_path)
    found = compared["arms"]["emo"]["module_general"]
    assert found["full"]["mean"] == pytest.approx(result["arms"][1]["full"]) and found["cost"] == pytest.approx(4 / 3)
    assert f"| emo | `whole_divergence`: {ARMS['whole_divergence'].sentence} | color | 1 |" in compared["text"]
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    status, result, _ = command("study", "transfer", study, "--labels", "color", "--variants", "emo", "--seeds", "0",
                                "--arms", few, "--out", tmp_path)
    assert status == 0 and result["arms"]["emo"]["module_general"] == found  # all of it is there
    status, result, _ = command("study", "adapt", run, "--label", "no", "--arms", "module", "--out", tmp_path / "x")
    assert status == 2 and "color, count" in result["error"]
