"""The model card of an export says what is true of it; what it shows runs without a warning."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import tiny_run
from published import copy, save_new

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.cli import main
from emo_jax.config import ModelConfig
from emo_jax.convert.card import count_parameters, model_card
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
from emo_jax.convert.importing import import_checkpoint
from emo_jax.surgery.extract import extract
from emo_jax.train import loop


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with an evaluation in its metrics.jsonl."""
    folder = tmp_path_factory.mktemp("trained")
    loop.train(tiny_run.tiny_config(folder, "--train.steps=4", "--model.head_dim=16"), folder / "run")
    return folder / "run"


def front_matter(card: str) -> dict:
    """Its keys; every value is JSON, which is YAML."""
    _, head, text = card.split("---\n", 2)
    assert text.startswith("\n# ")
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in head.splitlines())}


def test_parameters_are_counted_as_published():
    assert count_parameters(ModelConfig()) == (13_568_641_024, 1_489_045_504)
    assert count_parameters(ModelConfig(num_experts=0, num_shared_experts=0, d_ff=8192)) == (1_484_851_200,) * 2


@pytest.mark.parametrize("form, code, has, lacks", [
    ("hf", "own", "trust_remote_code=True", "vllm"), ("hf", "published", "transformers 4.57, with the published", "vllm"),
    ("qwen2_moe", "own", "vllm serve me/tiny", "trust_remote_code")])
def test_a_card_tells_how_its_format_is_loaded_and_what_was_evaluated(trained, tmp_path, form, code, has, lacks):
    options = Options(code=code, license="apache-2.0", repo="me/tiny")
    export_checkpoint(str(trained), str(tmp_path / "hf"), form, options=options)
    card = (tmp_path / "hf/README.md").read_text()
    keys = front_matter(card)
    assert keys["license"] == "apache-2.0" and keys["library_name"] == "transformers" and "emo" in keys["tags"]
    assert "base_model" not in keys and "Kept experts" not in card
    assert has in card and lacks not in card and 'from_pretrained("me/tiny"' in card
    held = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert held["eval"] == "held_out"
    for label, figures in held["labels"].items():
        assert f"| {label} | {figures['tokens']:,} | {figures['loss']:.4f} | {figures['bits_per_byte']:.4f} |" in card


def test_a_card_of_a_subset_names_the_kept_experts_and_what_is_not_known_of_them(trained, tmp_path):
    found = open_checkpoint(trained)
    kept = np.arange(7) % 2 == np.arange(2)[:, None]
    extract(found, full(found.config).with_mask(kept, method="router"), tmp_path / "small")
    export_checkpoint(str(tmp_path / "small"), str(tmp_path / "hf"))
    card = (tmp_path / "hf/README.md").read_text()
    assert "| 0 | 5 | 0, 2, 4, 6 |" in card and "| 1 | 4 | 1, 3, 5 |" in card and "Chosen by `router`" in card
    assert "was not measured" in card and "| all |" not in card and "expert-subset" in front_matter(card)["tags"]


def test_a_card_calls_an_imported_model_by_the_name_of_the_published_one(tmp_path):
    for name, kind, base in (("Emo_1b14b_1T", "An EMO", "allenai/Emo_1b14b_1T"),
                             ("StdMoE_1b4b_130B", "A standard mixture-of-experts", "allenai/StdMoE_1b4b_130B"),
                             ("mine", "A mixture-of-experts", None)):
        import_checkpoint(str(copy("emo", tmp_path / name)), str(tmp_path / f"run {name}"))
        card = model_card(open_checkpoint(tmp_path / f"run {name}"), Options("float32"), "deepseek", "gguf")
        assert f"{kind} language model" in card and "llama-cli" in card and "from_pretrained" not in card
        assert front_matter(card).get("base_model") == base


def test_the_command_states_the_licence(tmp_path):
    run, _ = save_new(tiny.config(), tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "hf"), "--license", "odd: [value"]) == 0
    assert front_matter((tmp_path / "hf/README.md").read_text())["license"] == "odd: [value"


CLIENT = """
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["red green", "one two six ten one"], padding=True, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids"] and inputs["attention_mask"][0, 0] == 0
    print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=4)))
"""


@pytest.mark.clients
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("torch", "transformers"))),
                    reason="needs torch and transformers (extra test-clients)")
def test_what_a_card_shows_runs_without_a_warning(trained, tmp_path):
    for form in ("hf", "qwen2_moe"):
        export_checkpoint(str(trained), str(tmp_path / form), form)
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", CLIENT, str(tmp_path / "hf"), str(tmp_path / "qwen2_moe")], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2
