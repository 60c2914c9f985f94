"""The library as people use it: texts in, numpy out, on any number of devices; and the examples of the README."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny_config

import emo_jax
from emo_jax.config import MeshConfig
from emo_jax.errors import InputError
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.calibration import from_tokens
from emo_jax.subsets.choose import choose_for_prompts, choose_one
from emo_jax.train.loop import train

TEXTS = ["red green blue", "one two six ten one", "gray"]
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    train(tiny_config(folder, "--train.steps=20", "--data.sequence_length=64"), folder / "runs" / "tiny")
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def model(run):
    return emo_jax.load(run)


@pytest.fixture(scope="module")
def subset(model):
    return emo_jax.choose_subset(model, TEXTS[:1], keep=4, method="router")


def test_the_loss_is_that_of_the_logits(model, subset):
    for chosen in (None, subset):
        losses = model.loss(TEXTS, subset=chosen)
        for text, loss in zip(TEXTS, losses, strict=True):
            tokens = model.tokenizer.encode_document(text)
            log_probs = np.asarray(jax.nn.log_softmax(model.logits(tokens, subset=chosen)))
            assert loss == pytest.approx(-log_probs[np.arange(len(tokens) - 1), tokens[1:]].mean(), rel=1e-5)
    rows = np.stack([model.tokenizer.encode_document(t)[:2] for t in TEXTS])
    np.testing.assert_allclose(model.logits(rows)[1], model.logits(rows[1]), rtol=1e-5)


def test_router_probabilities_are_of_each_text_alone(model, subset):
    found = model.router_probabilities(TEXTS)
    m = model.config.model
    for text, probabilities in zip(TEXTS, found, strict=True):
        tokens = len(model.tokenizer.encode_document(text))
        assert probabilities.shape == (tokens, m.num_layers, m.num_routed_experts)
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(model.router_probabilities([text])[0], probabilities, atol=1e-6)
    among = model.router_probabilities(TEXTS, subset=subset)[0]
    assert np.all(among[:, ~subset.mask()] == 0)


def test_a_model_opened_with_a_subset_uses_it_everywhere(run, model, subset, tmp_path):
    subset.save(tmp_path / "subset.json")
    small = emo_jax.load(run, subset=tmp_path / "subset.json")
    np.testing.assert_allclose(small.loss(TEXTS), model.loss(TEXTS, subset=subset), rtol=1e-6)
    assert small.generate(["red"], 8) == model.generate(["red"], 8, subset=subset)
    extracted = emo_jax.load(emo_jax.extract(run, subset, tmp_path / "small"))
    np.testing.assert_allclose(extracted.loss(TEXTS), small.loss(TEXTS), rtol=1e-5)


def test_prompts_may_have_a_subset_each(model):
    prompts = ["red green", "one two six ten", "gray"]
    ids = [model.tokenizer.encode(p) for p in prompts]
    own = choose_for_prompts(model, ids, keep=3)
    assert own[0].kept == choose_one(model, from_tokens(ids[:1]), "router", Budget(keep=3)).kept
    assert len({subset.kept for subset in own}) > 1
    assert model.generate(prompts, 8, subset=own) == [model.generate([p], 8, subset=s)[0] for p, s in zip(prompts, own)]
    with pytest.raises(InputError, match="2 subsets for 3 prompts"):
        model.generate(prompts, 8, subset=own[:2])


def test_devices_change_nothing(run, model):
    other = emo_jax.load(run, mesh=MeshConfig(data=2, fsdp=2, expert=2))
    np.testing.assert_allclose(other.loss(TEXTS), model.loss(TEXTS), rtol=1e-5)
    np.testing.assert_allclose(other.logits([3, 4, 5]), model.logits([3, 4, 5]), atol=1e-4)
    assert other.generate(TEXTS, 6) == model.generate(TEXTS, 6)


def test_what_is_no_text_is_named(run, model, subset):
    with pytest.raises(InputError, match="must be a list of strings"):
        model.loss("a string")
    with pytest.raises(InputError, match="text 2 has 201 tokens; a row holds 1 to 64"):
        model.router_probabilities(["red", "\x00" * 200])
    other = dataclasses.replace(subset, model={"name": "another", "step": 3, "hash": "0" * 16})
    for use in (lambda: model.loss(TEXTS, subset=other), lambda: model.generate(TEXTS, subset=other),
                lambda: emo_jax.load(run, subset=other), lambda: emo_jax.extract(run, other, "nowhere")):
        with pytest.raises(InputError, match="was chosen for another step 3"):
            use()


def test_the_examples_of_the_readme_run(run, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) >= 2
    monkeypatch.chdir(run.parent.parent)
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        for example in examples:
            exec(example, names)
    assert len(out.getvalue().splitlines()) > 10


def test_importing_the_library_imports_nothing_heavy():
    code = ("import sys, emo_jax; assert 'jax' not in sys.modules and 'load' in dir(emo_jax); emo_jax.load; "
            "assert 'jax' in sys.modules")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
