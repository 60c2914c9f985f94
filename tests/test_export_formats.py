"""What `emo-jax export` writes besides folders for transformers: GGUF files, expert profiles."""

import json

import numpy as np
import pytest
import tiny
from published import open_params, outputs, save_new
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
from emo_jax.convert.formats.expert_profile import prune_ratio
from emo_jax.convert.gguf_tokenizer import PRE_TOKENIZERS
from emo_jax.errors import InputError
from emo_jax.surgery.extract import extract

gguf = pytest.importorskip("gguf")


@pytest.fixture
def run(tmp_path):
    return with_tokenizer(save_new(tiny.config(model=dict(vocab_size=300, d_ff=32)), tmp_path / "run")[0])


def with_tokenizer(run):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(["some words and more of some other words"] * 5, BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    tokenizer.save(str(run / "tokenizer.json"))
    return run


def read(folder):
    """(fields, tensors as float32 by name, their kinds) of the one file in a folder."""
    (path,) = folder.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, kinds


def llama_cpp(fields, w, tokens):
    """Logits [T, V] by the graph of llama.cpp's `deepseek` and `bailingmoe`, in numpy."""
    a = fields["general.architecture"]
    heads, groups = fields[f"{a}.attention.head_count"], fields[f"{a}.attention.head_count_kv"]
    width, eps = fields[f"{a}.attention.key_length"], fields[f"{a}.attention.layer_norm_rms_epsilon"]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def swiglu(x, gate, up, down):
        g = x @ gate.T
        return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T

    def rotate(x):  # neighbouring values are a pair
        angle = np.arange(len(x))[:, None] * fields[f"{a}.rope.freq_base"] ** (-np.arange(0, width, 2) / width)
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = w["token_embd.weight"][tokens].astype(np.float64)
    for i in range(fields[f"{a}.block_count"]):
        b = {name.removeprefix(f"blk.{i}.").removesuffix(".weight"): v for name, v in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, b["attn_norm"])
        q, k, v = (h @ b[f"attn_{n}"].T for n in "qkv")
        q, k, v = rotate(q.reshape(-1, heads, width)), rotate(k.reshape(-1, groups, width)), v.reshape(-1, groups, width)
        k, v = np.repeat(k, heads // groups, 1), np.repeat(v, heads // groups, 1)
        scores = np.einsum("thw,shw->hts", q, k) / np.sqrt(width)
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shw->thw", weights, v).reshape(len(tokens), -1) @ b["attn_output"].T
        h = norm(x, b["ffn_norm"])
        y = swiglu(h, b["ffn_gate_shexp"], b["ffn_up_shexp"], b["ffn_down_shexp"])
        logits = h @ b["ffn_gate_inp"].T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        for t in range(len(tokens)):
            chosen = np.argsort(-p[t], kind="stable")[: fields[f"{a}.expert_used_count"]]
            factor = fields[f"{a}.expert_weights_scale"] / (p[t][chosen].sum() if fields[f"{a}.expert_weights_norm"] else 1)
            for e in chosen:
                y[t] += factor * p[t][e] * swiglu(h[t], *(b[f"ffn_{n}_exps"][e] for n in ("gate", "up", "down")))
        x = x + y
    return norm(x, w["output_norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("change, architecture", [
    ({}, "deepseek"), (dict(num_shared_experts=0), "deepseek"), (dict(num_shared_experts=2), "deepseek"),
    (dict(head_dim=16), "bailingmoe"), ("emo_v2", "bailingmoe")])
def test_the_graph_of_llama_cpp_gives_the_same_logits(change, architecture, tmp_path):
    router = dict(semantics="emo_v2") if change == "emo_v2" else {}
    model = dict(vocab_size=300, **({} if router else change))
    run = with_tokenizer(save_new(tiny.config(model=model, router=router), tmp_path / "run")[0])
    made = export_checkpoint(str(run), str(tmp_path / "out"), "gguf", options=Options("f32"))
    fields, tensors, _ = read(tmp_path / "out")
    assert made["architecture"] == fields["general.architecture"] == architecture
    tokens = np.random.default_rng(0).integers(0, 300, (1, 24)).astype(np.int32)
    ours, _, _ = outputs(*open_params(run), tokens)
    theirs = llama_cpp(fields, tensors, tokens[0])
    np.testing.assert_allclose(theirs, ours[0], rtol=0, atol=2e-4 * np.abs(ours).max())


def test_a_subset_is_a_file_of_its_own_size(run, tmp_path):
    found = open_checkpoint(run)
    extract(found, full(found.config).with_mask(np.tile(np.arange(15) < 4, (2, 1))), tmp_path / "small")
    with_tokenizer(tmp_path / "small")
    export_checkpoint(str(tmp_path / "small"), str(tmp_path / "out"), "gguf", options=Options("f16"))
    fields, tensors, kinds = read(tmp_path / "out")
    assert fields["deepseek.expert_count"] == 4 and tensors["blk.0.ffn_up_exps.weight"].shape == (4, 32, 32)
    assert [kinds[name] for name in ("blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight", "output_norm.weight")] == [
        "F16", "F32", "F32"]


def test_eight_bits_are_within_half_a_step(run, tmp_path):
    for dtype in ("f32", "q8_0"):
        export_checkpoint(str(run), str(tmp_path / dtype), "gguf", options=Options(dtype))
    (_, exact, _), (_, rounded, kinds) = read(tmp_path / "f32"), read(tmp_path / "q8_0")
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    for name, values in exact.items():
        blocks = values.reshape(-1, 32)
        step = np.abs(blocks).max(-1, keepdims=True) / 127
        assert (np.abs(rounded[name].reshape(-1, 32) - blocks) <= 0.5 * step + 1e-3 * np.abs(blocks).max()).all(), name


def test_the_tokenizer_is_in_the_file(run, tmp_path):
    export_checkpoint(str(run), str(tmp_path / "out"), "gguf")
    fields, _, _ = read(tmp_path / "out")
    content = json.loads((run / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 300 and all(tokens[i] == token for token, i in content["model"]["vocab"].items())
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.add_bos_token"] is False
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert len(fields["tokenizer.ggml.merges"]) == len(content["model"]["merges"])


def test_what_llama_cpp_cannot_express_is_refused(run, tmp_path):
    def refused(message, run=run, form="gguf", **options):
        with pytest.raises(InputError, match=message):
            export_checkpoint(str(run), str(tmp_path / "out"), form, options=Options(**options))
        assert not (tmp_path / "out").exists()

    uneven, _ = save_new(tiny.config(model=dict(experts_per_layer=(16, 8))), tmp_path / "uneven")
    refused("the same number of experts in every layer", uneven)
    narrow, _ = save_new(tiny.config(model=dict(vocab_size=300)), tmp_path / "narrow")
    refused("has no tokenizer.json", narrow)
    refused(r"ffn_down_exps.weight have 16; give --dtype f16", with_tokenizer(narrow), dtype="q8_0")
    refused("this format has float16, float32", dtype="int3")
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, tokenizer["pre_tokenizer"]]}
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("llama.cpp knows no pre-tokenizer .*Digits")
    refused("needs --subset FILE", form="expert-profile")
    refused("writes a whole model; make a model of --subset", subset="task.json")


def test_every_known_pre_tokenizer_has_a_name_of_its_own():
    assert len(set(PRE_TOKENIZERS.values())) == len(PRE_TOKENIZERS)


def test_a_profile_names_the_kept_experts_first_and_the_others_as_pruned(run, tmp_path):
    found = open_checkpoint(run)
    scores = np.random.default_rng(0).random((2, 15))
    kept = np.argsort(np.argsort(-scores)) < 5
    subset = full(found.config).with_mask(kept, scores=tuple(map(tuple, scores)), method="router")
    subset.save(tmp_path / "task.json")
    made = export_checkpoint(str(run), str(tmp_path / "out"), "expert-profile",
                             options=Options(subset=str(tmp_path / "task.json")))
    lines = [json.loads(line) for line in (tmp_path / "out/experts.jsonl").read_text().splitlines()]
    for layer, line in enumerate(lines):
        assert list(line) == [str(layer)] and line[str(layer)] == np.argsort(-scores[layer]).tolist()
    assert int(15 * (1.0 - made["expert_prune_ratio"])) == 5
    for routed in (15, 31, 127, 511):  # as the server counts, which cuts off
        assert all(int(routed * (1.0 - prune_ratio(k, routed))) == k for k in range(1, routed + 1))
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    pruned = np.zeros_like(kept)
    pruned[tuple(zip(*profile["pruned_experts"]))] = True
    np.testing.assert_array_equal(pruned, ~kept)
    few = full(found.config).with_mask(np.tile(np.arange(15) < 2, (2, 1)))
    few.save(tmp_path / "few.json")
    with pytest.raises(InputError, match="layer 0 keeps 2 routed experts; servers choose 3"):
        export_checkpoint(str(run), str(tmp_path / "no"), "expert-profile", options=Options(subset=str(tmp_path / "few.json")))
