"""The study of two small models from end to end."""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from tiny_run import config_file, tiny_config

from emo_jax import cli
from emo_jax.config import difference, load_config
from emo_jax.errors import InputError, RunError
from emo_jax.study import estimates, variants
from emo_jax.study import run as study_run
from emo_jax.study.measure import measure
from emo_jax.subsets import methods
from emo_jax.train.loop import train


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
    assert list(emo["positions"]) == ["1 to 16", "17 to 64", "65 to 256"]  # rows have 32 tokens
    assert emo["positions"]["1 to 16"] > 0 == emo["positions"]["65 to 256"]
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
    assert list(emo["selective_gap"]) == ["document", "causal", "first 64 tokens"]
    gaps = {votes: shares["25%"]["trained"] for votes, shares in emo["selective_gap"].items()}
    assert gaps["causal"] != gaps["document"] and gaps["first 64 tokens"] == gaps["causal"]  # of documents of 32 tokens
    assert "| model | 25%, document | 12.5%, document | 25%, causal |" in text
    losses = [json.loads((study / "emo" / s / "measures.json").read_text())["full"]["trained"] for s in "01"]
    found = result["variants"]["emo"]["full"]["trained"]
    assert found["mean"] == pytest.approx(np.mean(losses)) and found["half_width"] == pytest.approx(
        12.706 * abs(losses[0] - losses[1]) / 2, rel=1e-3)  # t of one degree of freedom

    for path in study.glob("*/*/measures.json"):  # those of an earlier version
        measures = json.loads(path.read_text())
        del measures["selective_gap"]
        path.write_text(json.dumps(measures))
    assert command("study", "report", study)[0] == 0 and "25%, causal" not in (study / "study.md").read_text()


def test_measures_on_the_run_s_own_text(study):
    """Without --data: what the run held out and left out, and nothing that it was trained on."""
    found = measure(str(study / "emo" / "0"), methods=("router",), choosing=(2,))
    assert found["labels"] == {"trained": ["color"], "left_out": ["count"]}


def test_what_cannot_be_compared(study, tmp_path):
    with pytest.raises(InputError, match="no VARIANT/SEED/measures.json"):
        estimates.read(tmp_path)
    (tmp_path / "emo" / "0").mkdir(parents=True)
    (tmp_path / "emo" / "0" / "measures.json").write_text("{}")
    with pytest.raises(InputError, match="not the measures of a model"):
        estimates.read(tmp_path)
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
        *((m, 50) for m in methods.NAMES), ("router", 1), ("router", 5)}

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
