"""Published checkpoints in and out: the same function, the same bits, and what is wrong with a folder by name."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from published import copy, golden, open_params, outputs, save_new
from safetensors.numpy import load_file, save_file
from test_training_oracle import FIXTURES, from_published

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.convert import importing, tensors
from emo_jax.convert.description import require_same
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
from emo_jax.convert.importing import import_checkpoint
from emo_jax.convert.layouts import entries
from emo_jax.errors import InputError


def equal_bits(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.parametrize("name", ["emo", "dense"])
def test_imported_models_compute_what_the_published_code_does(name, tmp_path):
    folder, io = golden(name)
    import_checkpoint(str(folder), str(tmp_path / "run"))
    opened = open_params(tmp_path / "run")
    logits, x, (layers, route) = outputs(*opened, io["input_ids"])
    close = dict(rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, io["logits"], **close)
    np.testing.assert_allclose(x, io["hidden_states"][-1], **close)
    np.testing.assert_allclose(layers[:-1], io["hidden_states"][1:-1], **close)
    if name == "emo":
        routed = io["router_logits"][..., :15].astype(np.float64)
        expected = routed - np.log(np.exp(routed).sum(-1, keepdims=True))
        np.testing.assert_allclose(np.log(route.scores), expected, **close)
        np.testing.assert_array_equal(route.expert_ids, io["selected_experts_routed"])
    logits, _, _ = outputs(*opened, io["padded_input_ids"], io["padded_attention_mask"])
    np.testing.assert_allclose(logits[0, 32:40], io["padded_logits_valid40"], **close)


@pytest.mark.parametrize("name", ["emo", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_out_of_the_published_layout_and_back_is_bit_exact(name, dtype, tmp_path):
    cast = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    source = copy(name, tmp_path / "hf", lambda w: {k: v.astype(cast) for k, v in w.items()}, unknown_key=[1, 2])
    (source / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": [3, 501]}')
    import_checkpoint(str(source), str(tmp_path / "run"))
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "back"), options=Options(code="published"))
    read = [tensors.Reader(tmp_path / f) for f in ("hf", "back")]
    assert equal_bits(*({n: r.read(n) for n in r.tensors} for r in read))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    assert {k: after[k] for k in before} == before | {"dtype": dtype}
    assert after["auto_map"]["AutoModelForCausalLM"].startswith("allenai/")
    assert (tmp_path / "back/generation_config.json").read_text() == (source / "generation_config.json").read_text()


@pytest.mark.parametrize("changes", [
    dict(model=dict(num_shared_experts=1)),
    dict(model=dict(num_shared_experts=2)),
    dict(model=dict(num_shared_experts=0)),
    dict(model=dict(experts_per_layer=(16, 9))),
    dict(model=dict(num_experts=0, num_shared_experts=0, num_kv_heads=4)),
], ids=["shared", "two shared", "none shared", "pruned unevenly", "dense"])
def test_out_of_a_checkpoint_and_back_is_bit_exact(changes, tmp_path):
    config = tiny.config(**changes)
    run, params = save_new(config, tmp_path / "run")
    if config.model.experts_per_layer:  # what a layer lacks is no part of the model
        for name in ("gate", "up", "down"):
            params["layers"]["moe"][name] = params["layers"]["moe"][name].copy()
            params["layers"]["moe"][name][1, 8:15] = 0
        params["layers"]["moe"]["router"] = params["layers"]["moe"]["router"].copy()
        params["layers"]["moe"]["router"][1, :, 8:] = 0
    export_checkpoint(str(run), str(tmp_path / "hf"), options=Options(shard_bytes=30_000))
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "back"))
    found, _, back = open_params(tmp_path / "back")
    require_same(config.model, found.model, config.name, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, back), params)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for file in set(index.values()):  # the library of the format reads what we write
        assert set(load_file(tmp_path / "hf" / file)) == {n for n, f in index.items() if f == file}


def test_layers_of_a_pruned_model_may_keep_different_numbers_of_experts(tmp_path):
    folder, io = golden("emo")
    keep = [[0, 3, 4, 8, 9, 14, 15], [1, 2, 11, 15], list(range(16))]

    def prune(w):
        out = {k: v for k, v in w.items() if ".mlp." not in k}
        for i, ids in enumerate(keep):
            p = f"model.layers.{i}.mlp."
            out[f"{p}gate.weight"] = w[f"{p}gate.weight"][ids]
            for new, old in enumerate(ids):
                for n in ("gate", "up", "down"):
                    out[f"{p}experts.{new}.{n}_proj.weight"] = w[f"{p}experts.{old}.{n}_proj.weight"]
        return out

    source = copy("emo", tmp_path / "hf", prune, num_experts_per_layer=[7, 4, 16], num_shared_experts_per_layer=[1] * 3)
    import_checkpoint(str(source), str(tmp_path / "pruned"))
    import_checkpoint(str(folder), str(tmp_path / "full"))
    allowed = np.array([[e in ids for e in range(15)] for ids in keep])
    pruned, _, _ = outputs(*open_params(tmp_path / "pruned"), io["input_ids"])
    masked, _, _ = outputs(*open_params(tmp_path / "full"), io["input_ids"], allowed=allowed)
    np.testing.assert_allclose(pruned, masked, atol=2e-5)
    export_checkpoint(str(tmp_path / "pruned"), str(tmp_path / "back"))
    assert equal_bits(load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors"))
    with pytest.raises(InputError, match="same number of experts in every layer"):
        export_checkpoint(str(tmp_path / "pruned"), str(tmp_path / "stock"), "qwen2_moe")


@pytest.mark.parametrize("flat", [False, True])
def test_state_dict_of_the_trainer(flat, tmp_path):
    inputs = np.load(FIXTURES / "train_inputs.npz")
    weights = {k.removeprefix("init/"): inputs[k].astype(np.float32) for k in inputs if k.startswith("init/")}
    flattened = {k: v.reshape(-1) if "router" in k else v.reshape(-1, v.shape[-1]) if "experts" in k else v
                 for k, v in weights.items()}
    save_file({k: np.ascontiguousarray(v) for k, v in (flattened if flat else weights).items()},
              tmp_path / "state.safetensors")
    (tmp_path / "oracle.py").write_text("from test_training_oracle import config\n")
    with pytest.raises(InputError, match="--config"):
        import_checkpoint(str(tmp_path / "state.safetensors"), str(tmp_path / "run"))
    import_checkpoint(str(tmp_path / "state.safetensors"), str(tmp_path / "run"), str(tmp_path / "oracle.py"))
    _, _, params = open_params(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), from_published(weights))


def test_an_import_that_was_stopped_goes_on(tmp_path, monkeypatch):
    folder, _ = golden("emo")
    import_checkpoint(str(folder), str(tmp_path / "whole"))
    monkeypatch.setattr(importing, "BATCH_BYTES", 50_000)
    read, names = tensors.Reader.read, []

    def failing(self, name):
        if len(names) == 100:
            raise OSError("the disk is gone")
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(tensors.Reader, "read", failing)
    with pytest.raises(OSError):
        import_checkpoint(str(folder), str(tmp_path / "run"))
    names.clear()
    import_checkpoint(str(folder), str(tmp_path / "run"))
    assert len(names) < 100  # there are 168, and 3 routers again
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, open_params(tmp_path / "run")[2], open_params(tmp_path / "whole")[2])
    with pytest.raises(InputError, match="already holds a checkpoint"):
        import_checkpoint(str(folder), str(tmp_path / "run"))


def test_every_tensor_of_the_published_model_is_known():
    from emo_jax.config import ModelConfig

    plan = list(entries("emo", ModelConfig()))
    assert len(plan) == 3 + 16 * 391 and sum(int(np.prod(e.shape)) for e in plan) == 13_568_641_024


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize("change, message", [
    (dict(tensors=lambda w: {k: v for k, v in w.items() if k != GATE}), rf"missing {GATE} \[16, 64\]"),
    (dict(tensors=lambda w: w | {"model.extra": w[GATE]}), r"unexpected model.extra \[16, 64\]"),
    (dict(tensors=lambda w: w | {GATE: w[GATE][:15]}), rf"{GATE} has shape \[15, 64\], expected \[16, 64\]"),
    (dict(tensors=lambda w: w | {GATE: w[GATE].astype(np.int32)}), "dtype I32; expected F32, BF16, F16"),
    (dict(tensors=lambda w: w | {GATE: w[GATE] * np.nan}), "not finite"),
    (dict(vocab_size=500), r"embed_tokens.weight has shape \[512, 64\], expected \[500, 64\]"),
    (dict(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM.*expected EmoForCausalLM or Olmo2"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings=True is not supported; only False is"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_type='yarn'"),
    (dict(hidden_size="64"), "hidden_size='64' must be an integer"),
])
def test_what_is_wrong_is_named(change, message, tmp_path):
    source = copy("emo", tmp_path / "hf", **change)
    with pytest.raises(InputError, match=message):
        import_checkpoint(str(source), str(tmp_path / "run"))
    assert not (tmp_path / "run/checkpoints/0").exists()


def test_damaged_files_are_named(tmp_path):
    source = copy("emo", tmp_path / "hf")
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(InputError, match="model.safetensors: cut off"):
        import_checkpoint(str(source), str(tmp_path / "run"))
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(InputError, match="model.safetensors: not a safetensors file"):
        import_checkpoint(str(source), str(tmp_path / "run"))
    (source / "config.json").write_text("{")
    file.write_bytes(data)
    with pytest.raises(InputError, match="config.json: not JSON"):
        import_checkpoint(str(source), str(tmp_path / "run"))
    with pytest.raises(InputError, match="no checkpoint at"):
        import_checkpoint(str(tmp_path / "nowhere"), str(tmp_path / "run"))


def test_the_later_router_comes_back_as_it_went(tmp_path):
    run, _ = save_new(tiny.config(router=dict(semantics="emo_v2")), tmp_path / "run")
    export_checkpoint(str(run), str(tmp_path / "hf"))
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "back"))
    back = open_checkpoint(tmp_path / "back")
    assert back.config.router.semantics == "emo_v2" and back.config.router.load_balance_weight == 0.01
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
    np.testing.assert_array_equal(outputs(*open_params(run), tokens)[0], outputs(*open_params(tmp_path / "back"), tokens)[0])
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"routed_scaling_factor": 2.0}))
    with pytest.raises(InputError, match=r"routed_scaling_factor=2.0 is not supported; .* true with 3.0 \(emo_v2\)"):
        import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "no"))


def test_later_upstream_models_are_refused_by_what_they_have(tmp_path):
    folder = copy("emo", tmp_path / "later", architectures=["Olmo3MoeForCausalLM"], model_type="olmo3moe", use_peri_ln=True,
                  use_rope=False, latent_moe_dim=32, layer_types=["linear_attention", "full_attention"], embed_scale=1.0)
    with pytest.raises(InputError, match=r"norms behind attention.*; use_peri_ln=True; use_rope=False; latent_moe_dim=32; "
                                         "layer_types has linear_attention$"):
        import_checkpoint(str(folder), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    save_file({"blocks.0.routed_experts.w_down": np.zeros((2, 2), np.float32)}, tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="of the later trainer .blocks.0.routed_experts.w_down."):
        import_checkpoint(str(tmp_path / "state.safetensors"), str(tmp_path / "run"))


def test_export_refuses_what_it_cannot_write(tmp_path):
    run, _ = save_new(tiny.config(router=dict(semantics="emo_v2")), tmp_path / "v2")
    with pytest.raises(InputError, match="router.semantics=emo_v2 cannot be exported"):
        export_checkpoint(str(run), str(tmp_path / "out"), options=Options(code="published"))
    run, _ = save_new(tiny.config(model=dict(experts_per_layer=(16, 3))), tmp_path / "few")
    with pytest.raises(InputError, match="model.top_k=4 experts in every layer; layer 1 has 3"):
        export_checkpoint(str(run), str(tmp_path / "out"), options=Options(code="published"))
    run, _ = save_new(tiny.config(), tmp_path / "run")
    with pytest.raises(InputError, match="--format llama is for dense models"):
        export_checkpoint(str(run), str(tmp_path / "out"), "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        export_checkpoint(str(run), str(tmp_path / "full"))
    meta = run / "checkpoints/0/meta/metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["params"]["sum"] ^= 1
    meta.write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match="their seal differs"):
        export_checkpoint(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_imported_model_can_be_trained_on(tmp_path):
    from dataclasses import replace

    import tiny_run

    from emo_jax.train import loop

    folder, _ = golden("emo")
    import_checkpoint(str(folder), str(tmp_path / "run"))
    imported, _, before = open_params(tmp_path / "run")
    own = tiny_run.tiny_config(tmp_path)
    config = replace(own, model=imported.model, router=imported.router,
                     train=replace(own.train, steps=1, init_from=str(tmp_path / "run")))
    with pytest.raises(InputError, match="parameters only .* train.init_params_from"):
        loop.train(config, tmp_path / "out")
    config = replace(config, train=replace(config.train, init_from="", init_params_from=str(tmp_path / "run")),
                     optimizer=replace(config.optimizer, learning_rate=1e-6))
    loop.train(config, tmp_path / "out")
    _, _, after = open_params(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), before, after)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, before, after)
