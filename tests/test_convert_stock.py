"""What we export for stock transformers computes there what the published code computes."""

import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from published import golden, open_params, outputs, save_new

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.importing import import_checkpoint
from emo_jax.surgery.extract import extract


def stock(folder, tokens):
    """(class name, logits, 8 greedy tokens after the first row's first 16)"""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # no tensor missing, left over or of another shape
    tokens = torch.tensor(tokens).long()
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
    made = model.generate(tokens[:1, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, 16:]
    return type(model).__name__, logits, made.numpy()[0]


@pytest.mark.parametrize("name, form, architecture", [
    ("emo", "deepseek", "Qwen2MoeForCausalLM"), ("dense", "llama", "LlamaForCausalLM")])
def test_published_models_in_stock_transformers(name, form, architecture, tmp_path):
    folder, io = golden(name)
    import_checkpoint(str(folder), str(tmp_path / "run"))
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "hf"), form)
    found, logits, _ = stock(tmp_path / "hf", io["input_ids"])
    assert found == architecture and "auto_map" not in json.loads((tmp_path / "hf/config.json").read_text())
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=2e-5)
    _, _, made = stock(tmp_path / "hf", io["greedy_ids"])
    start = int(io["greedy_prompt_len"])
    np.testing.assert_array_equal(made, io["greedy_ids"][0, start:start + 8])


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_own_models_with_grouped_queries_and_any_number_of_shared_experts(shared, tmp_path):
    config = tiny.config(model=dict(num_shared_experts=shared))
    run, _ = save_new(config, tmp_path / "run")
    export_checkpoint(str(run), str(tmp_path / "hf"), "qwen2_moe")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
    ours, _, _ = outputs(*open_params(run), tokens)
    _, theirs, _ = stock(tmp_path / "hf", tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(ours).max())


def test_an_extracted_subset_is_a_smaller_model_there(tmp_path):
    folder, io = golden("emo")
    import_checkpoint(str(folder), str(tmp_path / "run"))
    found = open_checkpoint(tmp_path / "run")
    kept = (np.arange(15) + np.arange(3)[:, None]) % 3 == 0  # 5 of 15 routed experts, others in every layer
    extract(found, full(found.config).with_mask(kept), tmp_path / "small")
    export_checkpoint(str(tmp_path / "small"), str(tmp_path / "hf"), "qwen2_moe")
    masked, _, _ = outputs(*open_params(tmp_path / "run"), io["input_ids"], allowed=kept)
    _, logits, _ = stock(tmp_path / "hf", io["input_ids"])
    np.testing.assert_allclose(logits, masked, rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_experts"] == 5
    export_checkpoint(str(tmp_path / "small"), str(tmp_path / "published"))
    assert json.loads((tmp_path / "published/config.json").read_text())["num_experts"] == 6  # with the shared one
