"""What is measured of routers (on activations whose answer is known), and the study of two small models from end to end."""

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from tiny_run import config_file, tiny_config

from emo_jax import cli
from emo_jax.analysis import clusters, information
from emo_jax.analysis.activations import Activations, collect
from emo_jax.config import difference, load_config
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError, RunError
from emo_jax.loaded import load
from emo_jax.study import report, variants
from emo_jax.study import run as study_run
from emo_jax.study.measure import measure
from emo_jax.subsets import calibration, modularity
from emo_jax.train.loop import train

LABELS, PIECES, LENGTH, R = 4, 40, 100, 8


def activations(expert_of, seed=0) -> Activations:
    """Tokens of 40 pieces, each of one of 4 labels; `expert_of(label, token)` is the expert of layer 0, and that of layer 1
    is drawn at random."""
    draw = np.random.default_rng(seed)
    pieces = np.repeat(np.arange(PIECES), LENGTH)
    labels, tokens = pieces % LABELS, draw.integers(0, 20, PIECES * LENGTH)
    experts = np.stack([np.vectorize(expert_of)(labels, tokens), draw.integers(0, R, len(tokens))], axis=1)
    probabilities = np.eye(R, dtype=np.float32)[experts]
    return Activations(probabilities, experts[..., None], tokens, pieces, labels, tuple("abcd"))


def test_experts_of_labels():
    a = activations(lambda label, token: label)
    by_label, by_token = information.label_information(a), information.token_information(a)
    assert by_label[0] == pytest.approx(math.log(LABELS), abs=0.2) and abs(by_label[1]) < 0.01
    assert np.all(abs(by_token) < 0.01)  # above chance: shuffled tokens show as much
    agreed = clusters.agreement(a, clusters.cluster(a, 16))
    assert agreed["label"] > 0.5 and abs(agreed["token"]) < 0.02
    assert information.effective_experts(a) == pytest.approx([1.0, 8.0], rel=0.06)


def test_experts_of_tokens():
    a = activations(lambda label, token: token % R)
    by_label, by_token = information.label_information(a), information.token_information(a)
    assert by_token[0] == pytest.approx(math.log(R), abs=0.2) and abs(by_token[1]) < 0.01
    assert abs(by_label[0]) < 0.01
    first = dataclasses.replace(a, probabilities=a.probabilities[:, :1], expert_ids=a.expert_ids[:, :1])
    agreed = clusters.agreement(first, clusters.cluster(first, R))
    assert agreed["token"] > 0.5 and abs(agreed["label"]) < 0.02


def test_a_piece_has_experts_of_its_own_without_telling_its_label():
    a = activations(lambda label, token: 0)
    own = np.random.default_rng(1).integers(0, R, PIECES)[a.pieces]
    a = dataclasses.replace(a, probabilities=np.eye(R)[np.stack([own, own], 1)])
    assert np.all(abs(information.label_information(a)) < 0.15)
    shuffled_tokens = information._between(a.probabilities, a.labels)
    assert np.all(shuffled_tokens > 0.15)  # what is subtracted is not nothing


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """EMO and the standard MoE, two seeds each, trained without the label "count"."""
    folder = tmp_path_factory.mktemp("study")
    fields = ["--train.steps=20", "--data.eval_fraction=0.3", "--data.leave_out_labels=count"]
    for name, pools in (("emo", "true"), ("stdmoe", "false")):
        for seed in (0, 1):
            config = tiny_config(folder, *fields, f"--seed={seed}", f"--router.document_pool={pools}")
            train(config, folder / "runs" / name / str(seed))
            fields += [f"--data.tokenizer={folder}/runs/emo/0/tokenizer.json"]
    return folder / "runs"


def command(*argv):
    """(exit status, the JSON object on the last line, standard error)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*map(str, argv), "--json"])
    return status, json.loads(out.getvalue().splitlines()[-1]), err.getvalue()


def test_study(study):
    documents = str(config_file(study.parent).parent / "documents.jsonl")
    for run in sorted(study.glob("*/*")):
        methods = ("--methods", "router,layerwise,random", "--documents", "1,6") if run.parent.name == "emo" else ()
        status, result, _ = command("study", "measure", run, "--data", documents, *methods, "--out", run / "measures.json")
        assert status == 0 and result["labels"] == {"trained": ["color"], "left_out": ["count"]}
        assert result["full"]["trained"] == pytest.approx(result["full"]["labels"]["color"])
        assert result["full"]["left_out"] > result["full"]["trained"] + 1  # words it has never seen
    emo = json.loads((study / "emo" / "0" / "measures.json").read_text())
    settings = {(r["method"], r["documents"], r["keep"]) for r in emo["subsets"]}
    assert settings == {(m, d, k) for m, d in (("router", 6), ("layerwise", 6), ("random", 6), ("router", 1))
                        for k in (4, 2)}  # 12.5 % of 8 experts would be the shared one alone
    assert emo["information"]["effective_experts"] is None  # rows of 32 tokens are too short to count

    status, result, _ = command("study", "report", study)
    assert status == 0 and list(result["variants"]) == ["emo", "stdmoe"] and result["variants"]["emo"]["seeds"] == [0, 1]
    text = (study / "study.md").read_text()
    rise = lambda run: next(r["trained"] for r in json.loads((study / run / "measures.json").read_text())["subsets"]
                            if (r["method"], r["share"]) == ("router", 0.5))
    assert result["main_over_baseline"]["50.0%"]["mean"] == pytest.approx(
        np.mean([rise(f"emo/{s}") / rise(f"stdmoe/{s}") for s in "01"]))
    assert "| emo | 2 |" in text and "what 6 reach over a random choice (emo)" in text
    assert (study / "study.png").stat().st_size > 10_000
    losses = [json.loads((study / "emo" / s / "measures.json").read_text())["full"]["trained"] for s in "01"]
    found = result["variants"]["emo"]["full"]["trained"]
    assert found["mean"] == pytest.approx(np.mean(losses)) and found["half_width"] == pytest.approx(
        12.706 * abs(losses[0] - losses[1]) / 2, rel=1e-3)  # t of one degree of freedom


def test_measures_on_the_run_s_own_text(study):
    """Without --data: what the run held out and left out, and nothing that it was trained on."""
    found = measure(str(study / "emo" / "0"), methods=("router",), choosing=(2,))
    assert found["labels"] == {"trained": ["color"], "left_out": ["count"]}


def test_activations_are_those_of_the_text(study):
    opened = load(str(study / "emo" / "0"))
    source = open_source(opened.config.data)
    text = calibration.from_source(opened.config, source, opened.tokenizer, {"color": [0, 2], "count": [1]})
    a = collect(opened, text)
    assert len(a.tokens) == text.fields["segment_ids"].astype(bool).sum() == sum(x["tokens"] for x in text.about)
    assert a.probabilities.sum(axis=2) == pytest.approx(1, abs=1e-5)
    top = np.take_along_axis(a.probabilities, a.expert_ids, axis=2)
    assert np.all(top[:, :, 0] == a.probabilities.max(axis=2))
    shares = np.stack([a.probabilities[a.labels == i].mean(axis=0) for i in (0, 1)])
    counts = np.bincount(a.labels).astype(float)
    assert np.all(modularity.mutual_information(shares, counts) >= 0)
    fewer = collect(opened, text, max_tokens=40)
    assert 0 < len(fewer.tokens) < len(a.tokens)


def test_what_cannot_be_compared(study, tmp_path):
    with pytest.raises(InputError, match="no VARIANT/SEED/measures.json"):
        report.read(tmp_path)
    (tmp_path / "emo" / "0").mkdir(parents=True)
    (tmp_path / "emo" / "0" / "measures.json").write_text("{}")
    with pytest.raises(InputError, match="not the measures of a model"):
        report.read(tmp_path)
    status, result, _ = command("study", "measure", study / "emo" / "0", "--documents", "0", "--out", tmp_path / "m.json")
    assert status == 2 and "must be positive" in result["error"]


# ---- all of it by one command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, quarter", [("study_cpu", 8), ("study_gpu", 16)])
def test_a_variant_is_the_base_with_its_own_fields(base, quarter):
    emo = load_config(base)
    changed = {name: difference(load_config(base, variants.fields(name, emo)), emo) for name in variants.VARIANTS}
    assert not changed["emo"] and all(changed[name] for name in variants.VARIANTS if name != "emo")
    assert all(key.startswith("router.") for fields in changed.values() for key in fields)
    assert {key: new for key, (_, new) in changed["fixed_pool"].items()} == {
        "router.pool_min": quarter, "router.pool_max": quarter}
    assert changed["stdmoe_v2"] == changed["stdmoe"] | changed["emo_v2"]
    with pytest.raises(InputError, match="unknown variant 'emoo'"):
        variants.fields("emoo", emo)


def test_the_study_goes_on_where_it_failed(tmp_path):
    """A model whose folder is a file fails, and is named with its log; the next call trains this one alone."""
    out, arguments = tmp_path / "study", ["--variants", "emo stdmoe", "--seeds", "0", "--jobs", "2", "--train.steps=4",
                                          "--data.eval_fraction=0.3", "--base", config_file(tmp_path)]
    (out / "stdmoe").mkdir(parents=True)
    (out / "stdmoe" / "0").write_text("")
    status, result, _ = command("study", "run", "--out", out, *arguments)
    assert status == 1 and result["error"] == f"stdmoe, seed 0 failed: {out / 'stdmoe' / '0.log'}"
    assert "is a file; expected a folder" in (out / "stdmoe" / "0.log").read_text()
    first = {path: path.read_bytes() for path in [out / "tokenizer.json", out / "emo" / "0.log", *out.glob("emo/0/*.json*")]}
    measures = json.loads(first[out / "emo" / "0" / "measures.json"])
    assert {(r["method"], r["documents"]) for r in measures["subsets"]} == {
        *((m, 50) for m in ("router", "layerwise", "easy_ep", "random")), ("router", 1), ("router", 5)}

    (out / "stdmoe" / "0").unlink()
    status, result, err = command("study", "run", "--out", out, *arguments)
    assert status == 0 and list(result["variants"]) == ["emo", "stdmoe"] and "1 of 2 models" in err
    assert all(path.read_bytes() == before for path, before in first.items())
    assert not json.loads((out / "stdmoe" / "0" / "config.json").read_text())["router"]["document_pool"]
    assert "| stdmoe | 1 |" in (out / "study.md").read_text()


def test_the_study_refuses_what_cannot_be_trained_or_measured(tmp_path):
    base = ["--base", config_file(tmp_path), "--out", tmp_path / "study"]
    for argument, said in (("--variants=emoo", "unknown variant"),
                           ("--router.pool_min=1", "router.pool_min=1"), ("--held-out=nowhere.jsonl", "--held-out: ")):
        status, result, _ = command("study", "run", *base, argument)
        assert status == 2 and said in result["error"]
    assert not (tmp_path / "study").exists()


def test_a_signal_ends_the_processes_of_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study_run, "EMO_JAX", [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])
    models = [study_run.Model(name, tmp_path / name, [["train"], ["study", "measure"]]) for name in ("a", "b", "c")]

    def stop() -> None:
        while not all((tmp_path / f"{name}.log").exists() and (tmp_path / f"{name}.log").read_text() for name in "ab"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        study_run._finish(models, jobs=2)
    assert [model.process and model.process.returncode for model in models] == [-signal.SIGTERM, -signal.SIGTERM, None]
    assert [len(model.commands) for model in models] == [1, 1, 2]
