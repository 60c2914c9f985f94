"""Exports in the engines that people run them in, each in an environment of its own: `bash launch/test.sh --engines` makes
them (EMO_JAX_ENGINES, default .engines) and runs these tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.subset import full
from emo_jax.convert.exporting import export_checkpoint
from emo_jax.convert.formats import Options
from emo_jax.convert.gguf_tokenizer import require_tokenizer
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.loaded import load
from emo_jax.surgery.extract import extract

SCRIPTS = Path(__file__).parent / "engines"
sys.path.append(str(SCRIPTS))
from answers import PROMPT, WRITTEN, of_logits  # noqa: E402

ENGINES = Path(os.environ.get("EMO_JAX_ENGINES", ".engines"))
ENVIRONMENTS = {"vllm": "vllm", "mlx": "mlx", "llama_cpp": "llama_cpp", "transformers": "transformers4"}
TOKENIZERS = Path(__file__).parents[2] / "shared/data/tokenizers"


def engine(name: str, script: str, *arguments) -> None:
    python = ENGINES / ENVIRONMENTS[name] / "bin/python"
    if not python.exists():
        pytest.skip(f"no environment {python.parent.parent}; bash launch/test.sh --engines makes it")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run([python, SCRIPTS / script, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(run, its quarter, rows [8, 128] of text that it was not trained on): a tiny EMO that has learnt a little."""
    folder = tmp_path_factory.mktemp("engines")
    run = folder / "run"
    subprocess.run([Path(sys.executable).with_name("emo-jax"), "train", "emo_tiny", "--out", str(run), "--train.steps=60",
                    "--train.eval_rows=8", "--data.workers=0"], check=True, env={**os.environ, "XLA_FLAGS": ""})
    found = open_checkpoint(run)
    kept = (np.arange(31) + np.arange(3)[:, None]) % 4 == 0  # 7 or 8 of 31
    kept[:, -1] |= kept.sum(1) < 8
    extract(found, full(found.config).with_mask(kept), folder / "quarter")
    model = load(str(run))
    source, documents = model.documents_to_score()
    tokens = np.concatenate([model.tokenizer.encode_document(source[int(i)].text)[:200] for i in documents])
    return {"run": run, "quarter": folder / "quarter"}, tokens[:1024].reshape(8, 128).astype(np.int32)


def ours(run: Path, rows: np.ndarray):
    model = load(str(run))
    argmax, logprob = zip(*[of_logits(logits, row) for logits, row in zip(model.logits(rows), rows)])
    return np.array(argmax), np.array(logprob), model


def answers(name: str, path: Path, rows: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    np.save(folder / "rows.npy", rows)
    engine(name, f"with_{name}.py", path, folder / "rows.npy", folder / "answers.npz")
    return dict(np.load(folder / "answers.npz"))


@pytest.mark.parametrize("part", ["run", "quarter"])
@pytest.mark.parametrize("name, form", [("transformers", "hf"), ("transformers", "qwen2_moe"), ("vllm", "qwen2_moe"),
                                        ("mlx", "qwen2_moe"), ("llama_cpp", "gguf")])
def test_an_export_says_the_same_in_every_engine(name, form, part, models, tmp_path):
    runs, rows = models
    made = export_checkpoint(str(runs[part]), str(tmp_path / "out"), form, options=Options("float32"))
    theirs = answers(name, tmp_path / "out" / made.get("file", ""), rows, tmp_path)
    argmax, logprob, model = ours(runs[part], rows)
    np.testing.assert_array_equal(theirs["argmax"], argmax)
    away = np.abs(theirs["logprob"] - logprob)
    assert np.median(away) < 5e-5 and np.quantile(away, 0.99) < 2e-3  # a near tie of two experts may fall the other way
    assert abs(theirs["logprob"].mean() - logprob.mean()) < 1e-4
    row = list(rows[0, :PROMPT])
    for _ in range(WRITTEN):
        row.append(int(model.logits(np.array(row)).argmax(-1)[-1]))
    np.testing.assert_array_equal(theirs["greedy"][0], row[PROMPT:])


def test_eight_bits_cost_less_than_half_a_percent_of_perplexity(models, tmp_path):
    runs, rows = models
    made = export_checkpoint(str(runs["run"]), str(tmp_path / "out"), "gguf", options=Options("q8_0"))
    theirs = answers("llama_cpp", tmp_path / "out" / made["file"], rows, tmp_path)
    _, logprob, _ = ours(runs["run"], rows)
    assert abs(np.exp(logprob.mean() - theirs["logprob"].mean()) - 1) < 0.005


def texts() -> list[str]:
    draw = random.Random(0)
    letters = "abcXYZ \n\t'.,!?-0123456789éßøñжλ漢字かなกा😀👩‍👧 \r\u200b\u00a0{}()[]<>/\\\"#"
    made = ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(400)]
    source = Path(__file__).read_text()
    return [*made, source, "  two  spaces\n\n\n and\r\n more   ", "I'll we've don't THEY'RE 1234567 12,345.67 x=1;",
            "Ünïcödé — “quotes” … naïve façade", "def f(x):\n    return x ** 2\n"]


@pytest.mark.parametrize("tokenizer", ["own", "dolma2", "gpt-neox-olmo"])
def test_llama_cpp_makes_the_same_tokens(tokenizer, models, tmp_path):
    runs, _ = models
    run = runs["run"]
    if tokenizer != "own":
        pytest.importorskip("gguf")
        path = TOKENIZERS / tokenizer / "tokenizer.json"
        if not path.exists():
            pytest.skip(f"{path} is not here")
        run = tmp_path / "run"
        subprocess.run(["cp", "-r", runs["run"], run], check=True)
        (run / "tokenizer.json").write_bytes(path.read_bytes())
    found = open_checkpoint(run)
    wider(found, require_tokenizer(found)[1], tmp_path / "vocabulary.gguf")
    (tmp_path / "texts.json").write_text(json.dumps(texts()))
    engine("llama_cpp", "tokens_llama_cpp.py", tmp_path / "vocabulary.gguf", tmp_path / "texts.json", tmp_path / "ids.json")
    known = Tokenizer(run / "tokenizer.json", found.config.data.eos_token)
    for text, ids in zip(texts(), json.loads((tmp_path / "ids.json").read_text())):
        assert ids == known.encode(text).tolist(), repr(text)


def wider(found, content, path):
    """A GGUF file of the tokenizer alone."""
    import gguf

    from emo_jax.convert.gguf_tokenizer import add_tokenizer

    size = 1 + max(*content["model"]["vocab"].values(), *(a["id"] for a in content["added_tokens"]))
    writer = gguf.GGUFWriter(path, "deepseek")
    writer.add_vocab_size(size)
    add_tokenizer(writer, require_tokenizer(found), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
