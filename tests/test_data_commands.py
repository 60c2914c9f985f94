"""The functions behind `emo-jax data`."""

import dataclasses
import itertools
import json
import re

import pytest
import tiny_run

from emo_jax import config as config_lib
from emo_jax import progress
from emo_jax.checkpoints import description
from emo_jax.cli import main
from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.bench import bench, bench_report
from emo_jax.data.inspect import _exact, inspect, inspect_report, save_picture
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenize import open_tokenization, tokenize
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.tools import open_data
from emo_jax.data.window import window, window_report


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"document {i} " + "word " * (i % 7) for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(
        json.dumps({"text": t, "source": "even" if i % 2 == 0 else "odd"}) + "\n" for i, t in enumerate(texts)))
    return Config(name="t", model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=4),
                  data=DataConfig(path=str(tmp_path / "d.jsonl"), sequence_length=32, max_documents_per_row=8))


def test_inspect_counts_and_shows_lengths_and_rows(config, tmp_path):
    result = inspect(config, tmp_path)
    source = open_source(config.data)
    tokenizer = Tokenizer(result["tokenizer"], config.data.eos_token)
    lengths = [len(tokenizer.encode_document(source[i].text)) for i in range(60)]
    assert result["documents"] == 60 == result["train_documents"] + result["eval_documents"]
    assert result["labels"] == {"even": 30, "odd": 30} and result["tokens"] == sum(lengths)
    assert result["bytes"] == sum(len(source[i].text.encode()) for i in range(60))
    for bar in result["histogram"]:
        assert bar["documents"] == sum(bar["from"] <= n <= bar["to"] for n in lengths)
    assert sum(bar["documents"] for bar in result["histogram"]) == 60
    assert all(sum(piece["tokens"] for piece in row) == 32 for row in result["rows"]) and len(result["rows"]) == 3
    assert 1 < result["documents_per_row"] <= 8 and 0 <= result["padding"] < 1
    assert json.loads(json.dumps(result)) == result


def test_the_report_shows_the_ends_of_documents_and_colours_only_on_a_terminal(config, tmp_path):
    result = inspect(config, tmp_path)
    plain, colored = inspect_report(result), inspect_report(result, colors=True)
    assert "60 documents" in plain and "even 30, odd 30" in plain and "padding" in plain
    escapes = re.compile("\x1b\\[[0-9;]*m")
    assert not escapes.search(plain) and [s.rstrip() for s in escapes.sub("", colored).split("\n")] == [
        s.rstrip() for s in plain.split("\n")]
    row = result["rows"][0]
    strip = re.search("^  ([█▒·]{96})$", plain, re.MULTILINE)[1]
    for piece in row:
        at = round(96 * piece["first"] / 32)
        assert strip[at] == "·" if not piece["segment"] else at == 0 or strip[at] != strip[at - 1]
        assert not piece["segment"] or f"document {piece['document']}: {piece['text'][:70]!r}" in plain


def test_inspect_counts_token_shards_exactly_and_draws_the_lengths(config, tmp_path, capsys):
    tokens, path = tmp_path / "tokens", tmp_path / "lengths.png"
    counts = tokenize(open_tokenization(config, tokens, min_tokens=20), 1)
    exact = _exact(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tokens))))
    assert exact["tokens"] == counts["tokens"] and sum(exact["labels"].values()) == counts["documents"]
    assert exact["train_documents"] == counts["documents"] - counts["held_out_documents"]
    assert exact["left_out"] == counts["left_out"]
    assert save_picture(inspect(config, tmp_path), path) == path and path.read_bytes()[:4] == b"\x89PNG"
    assert main(["data", "inspect", "emo_tiny", "--out", "lengths.txt"]) == 2
    assert "must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_window_shows_the_rows_that_training_reads(config, tmp_path, packing):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing, workers=0))
    source, tokenizer = open_data(config, tmp_path)
    iterator, rows, positions = make_train_iterator(config, source, tokenizer), [], []
    for _ in range(6):
        positions.append(iterator.state())
        batch = next(iterator)
        rows += [{name: batch[name][b] for name in batch} for b in range(4)]
    iterator.close()
    for first, last, position in [(0, 24, None), (9, 11, None), (10, 23, None), (17, 19, (3, positions[3])), (16, 24,
                                                                                                        (4, positions[4]))]:
        found = window(config, source, tokenizer, first, last, position)
        assert [(w["row"], w["step"], w["row_of_batch"]) for w in found] == [(k, k // 4, k % 4) for k in range(first, last)]
        for w, row in zip(found, rows[first:last]):
            assert [i for p in w["pieces"] for i in p.get("ids", [0] * p["tokens"])] == row["tokens"].tolist()
            for piece in w["pieces"]:
                at = slice(piece["first"], piece["first"] + piece["tokens"])
                assert set(row["segment_ids"][at]) == {piece["segment"]}
                if piece["segment"]:
                    assert set(row["document_ids"][at]) == {piece["document"]}
                    document = source[piece["document"]]
                    assert piece["label"] == document.label and piece["loss_tokens"] == row["loss_weights"][at].sum()
                    assert piece["text"].removesuffix("<|endoftext|>") in document.text
                    assert piece["where"] == f"{config.data.path}: document {piece['document'] + 1}"


def test_window_of_a_run_starts_at_its_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tiny_run.tiny_config(tmp_path)
    run = tmp_path / "run"
    source, tokenizer = open_data(config, run)
    iterator = make_train_iterator(config, source, tokenizer)
    for _ in range(5):
        next(iterator)
    (run / "config.json").write_text(config_lib.dumps(config))
    step = run / "checkpoints" / "5"
    step.mkdir(parents=True)
    sums = {"params": {"sum": 0, "finite": True}}
    description.write(step, description.describe(config, 5, 0, {}, sums, {"rows": iterator.state()}))
    iterator.close()
    assert main(["data", "window", "--run", str(run), "--rows", "43:46", "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)["rows"]
    saved = description.read(step)
    description.write(step, description.sealed(saved._replace(data={"rows": None})))  # as of a run that has read nothing yet
    assert main(["data", "window", str(tmp_path / "tiny.py"), "--run", str(run), "--rows", "43:46"]) == 0
    assert capsys.readouterr().out.strip() == window_report(of_run) and of_run[0]["step"] == 5
    for arguments, message in ((["--rows", "0:1"], "give CONFIG, or --run"),
                               (["--rows", "0:1", "--run", str(tmp_path)], "config.json: not the config of a run")):
        assert main(["data", "window", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "window", "emo_tiny", "--rows", "3:3"])
    assert "must be A:B such as 0:16" in capsys.readouterr().err


def test_bench_measures_each_number_of_workers(config, tmp_path):
    alone, *results = bench(config, tmp_path, workers=[0, 1], seconds=0.2)
    assert [r["what"] for r in results] == ["0 workers", "1 workers"]
    for r in results:
        assert r["tokens_per_second"] == pytest.approx(32 * r["rows_per_second"]) and r["rows_per_second"] > 0
        assert 0 <= r["padding"] < 1 and sum(r["parts"].values()) == pytest.approx(1)
    ratio = results[0]["tokens_per_cpu_second"] / alone["tokens_per_cpu_second"]
    assert results[0]["of_tokenizer"] == pytest.approx(ratio)


def test_bench_compares_token_files_with_a_plain_read_and_with_grain(config, tmp_path):
    tokenize(open_tokenization(config, tmp_path / "tokens", shards=2), 1)
    on_tokens = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "tokens")))
    first, rows, plain, grain = bench(on_tokens, tmp_path, workers=[0, 2], seconds=0.2, against_grain=True)
    assert first["what"] == "first batch" and rows["what"] == "2 threads" and "Grain" in grain["what"]
    assert rows["of_plain_read"] == pytest.approx(rows["tokens_per_second"] / plain["tokens_per_second"])
    assert grain["tokens_per_second"] > 0 and "of a plain read" in bench_report([first, rows, plain, grain])


def test_inspect_shows_token_files(config, tmp_path):
    tokenize(open_tokenization(config, tmp_path / "tokens", shards=2), 1)
    on_tokens = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "tokens")))
    result = inspect(on_tokens, tmp_path)
    assert result["exact"] and result["documents"] == 60 and result["train_documents"] + result["eval_documents"] == 60
    assert {p["label"] for row in result["rows"] for p in row if p["segment"]} <= {"even", "odd"}
    assert "tokens a document" in inspect_report(result)


def test_reading_many_documents_shows_progress(config, tmp_path, capfd, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    inspect(config, tmp_path)
    tokenize(open_tokenization(config, tmp_path / "tokens"), 1)
    err = capfd.readouterr().err
    for work in (f"reading a sample of {config.data.path}", f"tokenizing {config.data.path}"):
        assert f"{work}: " in err and "of 60 documents" in err
    assert "left, " in err and "tokens a second" in err
