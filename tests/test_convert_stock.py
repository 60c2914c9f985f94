"""What we export for stock transformers computes there what the published code computes."""

import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from published import golden, open_params, outputs, save_new
from safetensors.numpy import load_file, save_file

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
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


def test_the_later_router_with_its_normalised_scaled_weights(tmp_path):
    run, _ = save_new(tiny.config(router=dict(semantics="emo_v2")), tmp_path / "run")
    found = open_checkpoint(run)
    kept = (np.arange(15) + np.arange(2)[:, None]) % 3 != 0  # 10 of 15 routed experts, others in every layer
    extract(found, full(found.config).with_mask(kept), tmp_path / "small")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
    for name, allowed in (("run", None), ("small", kept)):
        export_checkpoint(str(tmp_path / name), str(tmp_path / f"{name}-hf"), "qwen2_moe")
        ours, _, _ = outputs(*open_params(run), tokens, allowed=allowed)
        _, theirs, _ = stock(tmp_path / f"{name}-hf", tokens)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(ours).max())
        np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_the_gate_of_the_shared_expert_is_a_half_to_the_bit_and_not_zero(tmp_path):
    folder, io = golden("emo")
    import_checkpoint(str(folder), str(tmp_path / "run"))
    logits = []
    for gate in (None, 0.0):
        out = tmp_path / f"gate{gate}"
        export_checkpoint(str(tmp_path / "run"), str(out), "qwen2_moe")
        weights = load_file(out / "model.safetensors")
        for name in [name for name in weights if "shared_expert_gate" in name]:
            assert weights[name].all()
            weights[name] = weights[name] if gate is None else np.full_like(weights[name], gate)
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        logits.append(stock(out, io["input_ids"])[1])
    np.testing.assert_array_equal(*logits)
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "half"), "qwen2_moe", options=Options("float16"))
    weights = load_file(tmp_path / "half/model.safetensors")
    assert all(w.all() for name, w in weights.items() if "shared_expert_gate" in name)


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
