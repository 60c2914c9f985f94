"""An export with our own modeling code (`emo_jax/convert/remote_code`) computes in transformers what the published code and
emo_jax compute, offline and without a warning; under transformers 4 too where EMO_JAX_TRANSFORMERS4 names a Python that has it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from published import golden, open_params, outputs, save_new

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
from emo_jax.convert.importing import import_checkpoint
from emo_jax.errors import InputError
from emo_jax.surgery.extract import extract

OTHER = os.environ.get("EMO_JAX_TRANSFORMERS4", "")
PYTHONS = [pytest.param(sys.executable, id="this"), pytest.param(OTHER, id="transformers4", marks=[
    pytest.mark.transformers4,
    pytest.mark.skipif(not OTHER, reason="EMO_JAX_TRANSFORMERS4 names no Python that has transformers 4 and torch")])]
OWN = {  # models of ours that the published code has no, or another, form for
    "two shared": dict(model=dict(num_shared_experts=2)),
    "none shared": dict(model=dict(num_shared_experts=0)),
    "uneven, one below top_k": dict(model=dict(experts_per_layer=(16, 3))),
    "later router": dict(router=dict(semantics="emo_v2")),
    "later router, uneven": dict(router=dict(semantics="emo_v2"), model=dict(experts_per_layer=(3, 9))),
    "dense, grouped queries, odd heads": dict(model=dict(num_experts=0, num_shared_experts=0, head_dim=12)),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{name: (exported folder, npz of inputs, logits by emo_jax)}"""
    folder, found = tmp_path_factory.mktemp("remote code"), {}
    for name in ("emo", "dense"):
        source, io = golden(name)
        import_checkpoint(str(source), str(folder / f"run {name}"))
        found[name] = (folder / f"run {name}", source / "io.npz", io["logits"])
    kept = (np.arange(15) + np.arange(3)[:, None]) % 3 == 0
    run, io = open_checkpoint(folder / "run emo"), golden("emo")[1]
    extract(run, full(run.config).with_mask(kept), folder / "run subset")
    found["subset"] = (folder / "run subset", golden("emo")[0] / "io.npz",
                       outputs(*open_params(folder / "run emo"), io["input_ids"], allowed=kept)[0])
    tokens = np.random.default_rng(0).integers(2, 64, (2, 24)).astype(np.int32)
    np.savez(folder / "tokens.npz", input_ids=tokens)
    for name, changes in OWN.items():
        run, _ = save_new(tiny.config(**changes), folder / f"run {name}")
        found[name] = (run, folder / "tokens.npz", outputs(*open_params(run), tokens)[0])
    for name, (run, _, _) in found.items():
        export_checkpoint(str(run), str(folder / name.replace(" ", "_").replace(",", "")))
    return {name: (folder / name.replace(" ", "_").replace(",", ""), *rest[1:]) for name, rest in found.items()}


@pytest.fixture(scope="module", params=PYTHONS)
def computed(request, cases, tmp_path_factory):
    """(what the client said, {name: its outputs}) by one Python, which may not use the network."""
    out = tmp_path_factory.mktemp("out")
    asked = [(str(folder), str(inputs), str(out / f"{i}.npz")) for i, (folder, inputs, _) in enumerate(cases.values())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "PYTHONPATH": "", "TQDM_DISABLE": "1"}
    done = subprocess.run([request.param, os.path.join(os.path.dirname(__file__), "remote_client.py"), json.dumps(asked)],
                          env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), {name: dict(np.load(a[2])) for name, a in zip(cases, asked)}


@pytest.mark.parametrize("name", ["emo", "dense", "subset", *OWN])
def test_it_computes_what_we_do(computed, cases, name):
    logits, found = cases[name][2], computed[1][name]
    tolerance = 2e-5 if name not in OWN else 2e-4 * np.abs(logits).max()  # those have parameters ten times as large
    np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found["saved"], logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found["last"][:, 0], found["logits"][:, -1], rtol=0, atol=tolerance)
    short = logits.shape[1] // 2  # the padded row is the first half of the first one
    np.testing.assert_allclose(found["padded"], found["logits"][0, :short], rtol=0, atol=tolerance)
    assert np.mean(found["bfloat16"].argmax(-1) == logits.argmax(-1)) > 0.8
    targets = np.load(cases[name][1])["input_ids"][:, 1:]
    log_probs = logits[:, :-1] - np.log(np.exp(logits[:, :-1].astype(np.float64)).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probs, targets[..., None], axis=-1).mean()
    np.testing.assert_allclose(found["loss"], nll, rtol=1e-4)


@pytest.mark.parametrize("name", ["emo", "dense", "subset", *OWN])
def test_texts_made_with_a_cache_or_in_a_padded_batch_are_those_of_single_rows(computed, name):
    found = computed[1][name]
    np.testing.assert_array_equal(found["together"], found["apart"])
    np.testing.assert_array_equal(found["together"], found["uncached"])


@pytest.mark.parametrize("name", ["emo", "dense"])
def test_hidden_states_are_the_published_ones(computed, name):
    np.testing.assert_allclose(computed[1][name]["hidden"], golden(name)[1]["hidden_states"], rtol=0, atol=2e-5)


def test_the_loss_in_training_has_the_load_balancing_loss_in_it(computed):
    for name, found in computed[1].items():
        balance = 0 if "dense" in name else found["balance"]
        np.testing.assert_allclose(found["trained"], found["loss"] + 0.01 * balance, rtol=1e-5)
        assert found["gradient"] > 0 and ("dense" in name or found["balance"] > 0.5)


def test_nothing_is_warned_of(computed):
    assert computed[0]["warnings"] == []


def test_the_published_code_is_named_where_it_is_asked_for_and_fits(cases, tmp_path):
    runs = cases["emo"][0].parent
    export_checkpoint(str(runs / "run emo"), str(tmp_path / "published"), options=Options(code="published"))
    config = json.loads((tmp_path / "published/config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("allenai/")
    assert not list((tmp_path / "published").glob("*.py"))
    for name, message in (("later router", "router.semantics=emo_v2"), ("uneven, one below top_k", "--code own allows it")):
        with pytest.raises(InputError, match=message):
            export_checkpoint(str(runs / f"run {name}"), str(tmp_path / "out"), options=Options(code="published"))


def test_the_code_refuses_a_config_that_it_does_not_compute(cases, tmp_path):
    import transformers

    config = transformers.AutoConfig.from_pretrained(cases["emo"][0], trust_remote_code=True)
    for key, value in (("rope_scaling", {"type": "yarn"}), ("always_active_experts", [1]), ("hidden_act", "gelu")):
        with pytest.raises(ValueError, match=key):
            type(config)(**{key: value})
