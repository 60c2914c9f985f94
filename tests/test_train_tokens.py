"""Training from token files: any batch size at any restart, stages with other mixtures and lengths, nothing read twice."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import records, series, tiny_config, write_documents

from emo_jax.checkpoints import checkpoint
from emo_jax.cli import main
from emo_jax.config import Stage
from emo_jax.data.sources import open_source
from emo_jax.data.stream import RowStream
from emo_jax.data.tokenize import open_tokenization, tokenize
from emo_jax.data.tools import open_data
from emo_jax.data.window import window
from emo_jax.errors import InputError, RunError
from emo_jax.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config file, and its documents as two token shards in `tokens`."""
    path = tmp_path_factory.mktemp("tokens")
    config = tiny_config(path)
    write_documents(path / "documents.jsonl", 400)
    tokenize(open_tokenization(config, path / "tokens", shards=2), processes=1)
    return path


def on_tokens(folder, *overrides, **fields):
    config = tiny_config(folder, f"data.path={folder / 'tokens'}", "mesh.data=2", "mesh.fsdp=2", "mesh.sequence=2", *overrides)
    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def whole(folder):
    train(on_tokens(folder, "checkpoint.every=1", "checkpoint.keep_last=9"), folder / "whole")
    return folder / "whole"


def cut_at(whole, out, step):
    """A copy of a run as it was after `step` steps."""
    shutil.copytree(whole, out)
    for later in checkpoint.steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(out / "checkpoints" / str(later))
    return out


def test_a_restart_goes_on_exactly_and_the_position_is_one_integer(folder, whole, tmp_path):
    out = cut_at(whole, tmp_path / "run", 3)
    assert checkpoint.open_checkpoint(out).position() == {"stages": [24]}
    train(on_tokens(folder), out)
    assert series(out) == series(whole)
    assert records(out)[-1]["loss_by_label"].keys() == {"color", "count"}


@pytest.mark.parametrize("batch", [4, 12])
def test_another_batch_size_reads_the_same_rows_on(folder, whole, tmp_path, batch):
    out = cut_at(whole, tmp_path / "run", 3)
    train(on_tokens(folder, f"train.batch_size={batch}", "train.steps=5"), out)
    assert checkpoint.open_checkpoint(out).position() == {"stages": [24 + 2 * batch]}
    config = on_tokens(folder)
    stream = RowStream(config, open_source(config.data))
    tokens = stream.rows(np.arange(24, 24 + 2 * batch))["segment_ids"] > 0
    assert records(out)[-1]["tokens"] - records(whole)[2]["tokens"] == tokens.sum()


def test_stages_change_mixture_and_length_and_keep_a_count_each(folder, tmp_path):
    stages = (Stage(until=2), Stage(until=4, changes=("data.mixture=count:3,color:1", "train.batch_size=16")),
              Stage(changes=("data.mixture=", "data.sequence_length=64", "train.batch_size=4")))
    config = on_tokens(folder, "train.steps=6", "checkpoint.every=1", "checkpoint.keep_last=9", stages=stages)
    train(config, tmp_path / "a")
    counts = [checkpoint.open_checkpoint(tmp_path / "a", step).position()["stages"] for step in (1, 2, 3, 5, 6)]
    assert counts == [[8], [16], [16, 16], [16, 32, 4], [16, 32, 8]]
    by_label = [r["tokens_by_label"] for r in records(tmp_path / "a")]
    assert by_label[2]["count"] == 3 * by_label[2]["color"]
    out = cut_at(tmp_path / "a", tmp_path / "b", 5)
    train(config, out)
    assert series(out) == series(tmp_path / "a")


def test_a_mixture_that_is_used_up_ends_the_run_with_its_last_good_checkpoint(folder, tmp_path):
    with pytest.raises(RunError, match=r"data.max_epochs=0.1 allows; the last good checkpoint is of step 2"):
        train(on_tokens(folder, "data.max_epochs=0.1", "train.steps=50", "checkpoint.every=1"), tmp_path / "run")


def test_data_of_another_tokenizer_is_refused(folder, whole, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text((folder / "tokens" / "tokenizer.json").read_text() + " ")
    with pytest.raises(InputError, match="was tokenized with another one"):
        train(on_tokens(folder, f"data.tokenizer={other}"), tmp_path / "run")


def test_a_shard_that_lost_its_end_is_refused_before_the_first_step(folder, tmp_path):
    broken = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    file = next(broken.glob("*.npy"))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{file.name}: it has [\d,]+ bytes; manifest.json says"):
        train(on_tokens(folder, f"data.path={broken}"), tmp_path / "run")


def test_a_shard_that_shrinks_during_the_run_is_named(folder, tmp_path):
    broken = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    config = on_tokens(folder, f"data.path={broken}")
    stream = RowStream(config, open_source(config.data))
    for file in broken.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises((RunError, OSError), match=r"shard-0000\d-of-00002.npy: .*changed while in use"):
        stream.rows(np.arange(20))


def test_window_shows_the_rows_that_a_step_was_trained_on(folder, whole):
    config = on_tokens(folder)
    rows = window(config, *open_data(config, whole), 16, 24)
    expected = RowStream(config, open_source(config.data)).rows(np.arange(16, 24))
    assert [row["step"] for row in rows] == [2] * 8
    for row, tokens, ids in zip(rows, expected["tokens"], expected["document_ids"]):
        assert [p["document"] for p in row["pieces"] if p["segment"]] == list(dict.fromkeys(ids.tolist()))
        assert [t for p in row["pieces"] if p["segment"] for t in p["ids"]] == tokens.tolist()
        assert all("shard-" in p["where"] for p in row["pieces"] if p["segment"])


def test_the_window_of_a_run_that_has_checkpoints_before_it(folder, whole, capsys):
    assert main(["data", "window", "--run", str(whole), "--rows", "40:42", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    config = on_tokens(folder)
    expected = RowStream(config, open_source(config.data)).rows(np.arange(40, 42))["tokens"]
    assert [[t for p in row["pieces"] if p["segment"] for t in p["ids"]] for row in rows] == expected.tolist()


_READER = """
import json, os, sys
import numpy as np
from emo_jax.config import from_dict
from emo_jax.data.sources import open_source
from emo_jax.data.stream import RowStream
from emo_jax.data.token_batches import TokenBatches
config, log = from_dict(json.loads(sys.argv[1])), sys.argv[2]
first = sum(1 for line in open(log) if line.endswith("\\n")) * 4 if os.path.exists(log) else 0
with open(log, "rb+" if first else "wb") as file:
    file.seek(0, 2)
    while file.tell() and (file.seek(-1, 1), file.read(1))[1] != b"\\n":  # a line torn by the kill
        file.truncate(file.seek(-1, 1))
    stream = RowStream(config, open_source(config.data))
    batches = TokenBatches(stream, first, 4)
    while batches.rows_read < stream.layouts[0].count:
        batch = next(batches)
        ids = batch["document_ids"][batch["segment_ids"] > 0]
        file.write(json.dumps(np.bincount(ids).tolist()).encode() + b"\\n")
        file.flush()
"""


def test_through_ten_random_kills_every_token_of_an_epoch_is_read_once(folder, tmp_path):
    config, log = on_tokens(folder, "data.sequence_length=16"), tmp_path / "log"
    source = open_source(config.data)
    rows = RowStream(config, source).layouts[0].count
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle=True))
    command, draw = [sys.executable, "-c", _READER, json.dumps(dataclasses.asdict(config)), str(log)], np.random.default_rng(0)
    for _ in range(10):
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(command)
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before + 100):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command).returncode == 0
    read = np.zeros(len(source), int)
    for line in log.read_text().splitlines()[:-(-rows // 4)]:
        counts = json.loads(line)
        read[:len(counts)] += counts
    extra = RowStream(config, source).rows(np.arange(rows, -(-rows // 4) * 4))  # of the next epoch
    read -= np.bincount(extra["document_ids"][extra["segment_ids"] > 0], minlength=len(source))
    for section, first in zip(source.sections, source.first_documents):
        for i in range(first, first + section.documents):
            assert read[i] == (0 if section.held_out else len(source.encoded(i, source.tokenizer)))
