"""Generation equals the forward pass without a cache, on any mesh and in any batch; sampling; the command."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from published import forward_pass, golden, rows_of, save_new

from emo_jax import model, sharding
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import Subset
from emo_jax.cli import main
from emo_jax.config import MeshConfig
from emo_jax.convert.importing import import_checkpoint
from emo_jax.errors import InputError
from emo_jax.generation import engine
from emo_jax.generation.engine import Generator
from emo_jax.generation.sampling import Sampling, nucleus, sample


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{name: (checkpoint, inputs and outputs)} of the tiny published models."""
    out = {}
    for name in ("emo", "dense"):
        folder, io = golden(name)
        run = tmp_path_factory.mktemp(name) / "run"
        import_checkpoint(str(folder), str(run))
        out[name] = (open_checkpoint(run), io)
    return out


def generator(found, mesh=None, **kwargs):
    config = found.config
    if mesh is not None:
        mesh = sharding.make_mesh(tiny.config(model=config.model, mesh=mesh, train=dict(batch_size=8)))
    mesh = mesh or sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        return Generator(config, mesh, found.restore_params(mesh, config), kwargs.pop("eos_ids", ()), **kwargs)


def by_forward_passes(found, prompts, count, allowed):
    """The greedy tokens of every prompt, each by a forward pass over all tokens before it."""
    mesh = sharding.single_device_mesh()
    lengths = np.array([len(p) for p in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + count), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    with jax.set_mesh(mesh):
        forward = forward_pass(found.config, mesh, allowed)
        params = found.restore_params(mesh)
        for n in range(count):
            segments = (np.arange(tokens.shape[1]) < lengths[:, None] + n).astype(np.int32)
            logits = np.asarray(forward(params, rows_of(mesh, tokens, segments)))
            for row, length in enumerate(lengths + n):
                tokens[row, length] = logits[row, length - 1].argmax()
    return [row[n : n + count].tolist() for row, n in zip(tokens, lengths)]


@pytest.mark.parametrize("name", ["emo", "dense"])
def test_greedy_equals_the_published_code(name, published):
    found, io = published[name]
    ids, start = io["greedy_ids"][0], int(io["greedy_prompt_len"])
    assert generator(found).generate([ids[:start]], len(ids) - start) == [ids[start:].tolist()]


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=1, expert=4), MeshConfig(data=2, fsdp=2, tensor=2)],
                         ids=["one device", "experts apart", "heads apart"])
def test_batches_meshes_and_subsets_change_no_token(mesh, published, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 16)
    found, io = published["emo"]
    prompts = [io["input_ids"][0, :n].tolist() for n in (3, 19, 11)]
    allowed = np.arange(15) % 3 != np.arange(3)[:, None]
    expected = by_forward_passes(found, prompts, 6, allowed)
    assert generator(found, mesh, allowed=allowed, batch_size=2).generate(prompts, 6) == expected


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=1, expert=4)], ids=["one device", "experts apart"])
def test_each_prompt_of_a_batch_uses_its_own_experts_and_others_compile_nothing_anew(mesh, published, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 16)
    found, io = published["emo"]
    prompts = [io["input_ids"][0, :n].tolist() for n in (3, 19, 11)]  # the engine reads the longest first
    masks = [np.arange(15) % 3 != (np.arange(3)[:, None] + i) % 3 for i in range(3)]
    expected = [by_forward_passes(found, [prompt], 6, mask)[0] for prompt, mask in zip(prompts, masks)]
    g = generator(found, mesh, batch_size=2)
    assert g.generate(prompts, 6, allowed=masks) == expected
    compiled = g._prefill._cache_size(), g._decode._cache_size()
    assert g.generate(prompts, 6, allowed=masks[::-1]) != expected
    assert (g._prefill._cache_size(), g._decode._cache_size()) == compiled


def test_rows_end_at_their_end_token_and_when_told(published):
    found, io = published["emo"]
    ids, start = io["greedy_ids"][0], int(io["greedy_prompt_len"])
    new = ids[start:].tolist()
    prompts, stops = [ids[:start], ids[: start - 4]], new[5]
    ended = generator(found, eos_ids=(stops,)).generate(prompts, 16)
    assert ended[0] == new[: new.index(stops)] and stops not in ended[1]
    assert len(generator(found).generate(prompts, 16, stop=lambda row, made: row == 0)[0]) == engine.DECODE_CHUNK
    pieces = list(generator(found).stream(prompts, 20))
    assert len(pieces) == 4 and sum(len(t) for row, t in pieces if row == 0) == 20


def test_a_row_draws_the_same_tokens_in_any_batch(published):
    found, io = published["emo"]
    g, prompts = generator(found), [io["input_ids"][0, :n].tolist() for n in (8, 5)]
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=7)
    first = g.generate(prompts, 12, sampling)
    assert g.generate([prompts[0], prompts[0]], 12, sampling)[0] == first[0]
    assert g.generate(prompts, 12, sampling) == first
    assert g.generate(prompts, 12, sampling._replace(seed=8)) != first
    g.generate([prompts[0][:7], prompts[1][:2]], 20, Sampling(0.5, 0.8))
    assert g._prefill._cache_size() == g._decode._cache_size() == 1  # other lengths and settings of the same buckets


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    rows = jnp.arange(4000)
    draw = lambda kind, t, p: np.bincount(np.asarray(sample(
        jnp.tile(logits, (4000, 1)), kind, t, p, 0, rows, rows)), minlength=4) / 4000
    np.testing.assert_allclose(draw("full", 1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(draw("full", 0.5, 1.0), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)
    np.testing.assert_allclose(draw("top_p", 1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    assert draw("greedy", 0, 1).tolist() == [1, 0, 0, 0]
    for p, kept in ((0.1, 1), (0.5, 1), (0.51, 2), (0.9, 3), (1.0, 4)):
        assert int(nucleus(logits, p).sum()) == kept


def test_decoding_is_ten_times_the_loop_without_cache(published):
    """256 new tokens of 8 rows, in processor time, which other programs on the machine do not change much."""
    c = tiny.config(model=dict(vocab_size=512, d_model=64, head_dim=16, d_ff=32), data=dict(sequence_length=320))
    mesh, new = sharding.single_device_mesh(), 256
    params = model.init_params(c, mesh)
    prompts = np.random.default_rng(0).integers(0, 512, (8, 32))
    g = Generator(c, mesh, params, ())
    g.generate(list(prompts), new)
    started = time.process_time()
    made = np.array(g.generate(list(prompts), new))
    cached = time.process_time() - started

    execution = model.Execution.of(c, mesh)
    tokens = np.concatenate([prompts, made], axis=1).astype(np.int32)
    batch = {"tokens": tokens, "positions": np.tile(np.arange(288, dtype=np.int32), (8, 1))}

    @jax.jit
    def next_token(params, batch, t):
        x, _ = model.forward(params, batch, execution)
        x = jax.lax.dynamic_slice_in_dim(x, t - 1, 1, axis=1)
        return jnp.argmax(model.logits(params, x, execution)[:, 0], axis=-1)

    def one(t):
        segments = np.broadcast_to(np.arange(288) < t, (8, 288)).astype(np.int32)
        with jax.set_mesh(mesh):
            return np.asarray(next_token(params, sharding.global_batch(mesh, batch | {"segment_ids": segments}), t))

    one(32)
    started, steps = time.process_time(), range(32, 288, 16)
    for t in steps:
        np.testing.assert_array_equal(one(t), made[:, t - 32])
    loop = (time.process_time() - started) / len(steps) * new
    assert loop > 10 * cached, (loop, cached)


def test_bad_requests_are_named(published):
    g = generator(published["emo"][0])
    for prompts, count, sampling, message in (
            ([[1], []], 4, Sampling(), "prompt 2 is empty"),
            ([[1] * 120], 9, Sampling(), "do not fit into the 128 tokens"),
            ([[1]], 0, Sampling(), "max-new-tokens=0"), ([[1]], 4, Sampling(temperature=-1), "--temperature -1"),
            ([[1]], 4, Sampling(1.0, 1.5), "--top-p 1.5")):
        with pytest.raises(InputError, match=message):
            g.generate(prompts, count, sampling)


def test_the_command_continues_prompts(tmp_path, capsys):
    import json

    from test_data_tokenizer import EOS, Texts

    from emo_jax.data.tokenizer import train_bpe

    config = tiny.config(model=dict(vocab_size=300))
    run, _ = save_new(config, tmp_path / "run")
    assert main(["generate", str(run), "--prompt", "red"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    train_bpe(Texts(), range(4), 300, run, EOS)
    arguments = ["generate", str(run), "--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    assert main([*arguments, "--prompt", "red", "green blue", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, two = result["completions"]
    assert one["prompt"] == "red" and len(one["tokens"]) <= 5 and two["finish_reason"] in ("stop", "length")
    assert main([*arguments, "--prompt", "red"]) == 0
    assert capsys.readouterr().out == f"red{one['text']}\n"

    def auto(*prompts):
        assert main(["generate", str(run), "--max-new-tokens", "5", "--subset", "auto", "--keep", "5", "--json", "--prompt",
                     *prompts]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]

    together = auto("red", "one two six", "green blue gray")
    assert together == [alone for prompt in ("red", "one two six", "green blue gray") for alone in auto(prompt)]
    assert len({str(c["experts"]) for c in together}) == 3
    for completion in together:
        kept = tuple(map(tuple, completion["experts"]))
        Subset(kept, 15, 1, "router").save(tmp_path / "subset.json")
        assert [len(layer) for layer in kept] == [4, 4]
        assert main(["generate", str(run), "--max-new-tokens", "5", "--subset", str(tmp_path / "subset.json"), "--json",
                     "--prompt", completion["prompt"]]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["completions"][0]["tokens"] == completion["tokens"]
