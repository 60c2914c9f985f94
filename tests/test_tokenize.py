"""`emo-jax data tokenize`: documents to token shards."""

import dataclasses
import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emo_jax.cli import main
from emo_jax.config import Config, DataConfig, ModelConfig
from emo_jax.data.documents import Document, Examples, Source
from emo_jax.data.shards import MANIFEST, STRIDE, parse_manifest, sha256
from emo_jax.data.sources import open_source
from emo_jax.data.tokenize import open_tokenization, tokenize
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.errors import InputError, RunError

COUNT, SEED = 700, 3


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "source": f"label{i % 3}"}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def texts():
    draw = random.Random(0)
    return [f"document {i} " + " ".join(draw.choice("red green blue one two six".split()) for _ in range(draw.randint(0, 30)))
            for i in range(COUNT)]


@pytest.fixture
def config(tmp_path, monkeypatch, tokenizer_file, texts):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "d.jsonl", texts)
    return Config(name="t", seed=SEED, model=ModelConfig(vocab_size=300),
                  data=DataConfig(path=str(path), tokenizer=tokenizer_file, eval_fraction=0.1))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = Config(name="t", model=ModelConfig(vocab_size=300))
    return str(load_tokenizer(config, Examples("texts", texts), range(COUNT), folder).path)


def changed(config, **fields):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def write(config, out, *, processes=1, part=(0, 1), **options):
    return tokenize(open_tokenization(config, out, **options), processes, part)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder):
    """[(label, held out, number in the source, token ids)] of all documents, read as the layout says."""
    manifest, documents = parse_manifest((folder / MANIFEST).read_text(), "manifest"), []
    for shard in manifest.shards:
        assert sha256((folder / shard.file).read_bytes()) == shard.sha256
        assert sha256((folder / shard.index).read_bytes()) == shard.index_sha256
        tokens = np.memmap(folder / shard.file, np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
        index, n = np.fromfile(folder / shard.index, "<i8"), shard.documents
        summary, ends, ids = np.split(index, [-(-n // STRIDE), -(-n // STRIDE) + n])
        assert len(ids) == n and len(tokens) == shard.tokens == ends[-1] and np.array_equal(summary, ends[::STRIDE])
        starts, at = np.concatenate([[0], ends[:-1]]), 0
        for section in shard.sections:
            mine = range(at, at + section.documents)
            assert sum(ends[i] - starts[i] for i in mine) == section.tokens
            documents += [(section.label, section.held_out, int(ids[i]), tokens[starts[i]:ends[i]].tolist()) for i in mine]
            at += section.documents
        assert at == n
    return documents


def expected(config):
    source, tokenizer = open_source(config.data), Tokenizer(config.data.tokenizer, config.data.eos_token)
    return [(source[i].label, i, tokenizer.encode_document(source[i].text).tolist()) for i in range(len(source))]


def without_held_out(documents):
    return sorted((label, number, tokens) for label, _, number, tokens in documents)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_document_is_written_once_whatever_the_number_of_shards(config, tmp_path, shards):
    result = write(config, tmp_path / "out", shards=shards)
    documents = read(tmp_path / "out")
    assert without_held_out(documents) == sorted(expected(config))
    manifest = parse_manifest((tmp_path / "out" / MANIFEST).read_text(), "manifest")
    for number, shard in enumerate(manifest.shards):
        sections = [(s.held_out, s.label) for s in shard.sections]
        assert sections == sorted(sections)  # what is trained on comes first
        assert shard.documents == (number + 1) * COUNT // shards - number * COUNT // shards
    assert result["documents"] == COUNT and result["tokens"] == sum(len(d[3]) for d in documents)
    assert result["held_out_documents"] == sum(d[1] for d in documents) and 40 < result["held_out_documents"] < 100
    assert all(tokens[-1] == manifest.eos_id and manifest.eos_id not in tokens[:-1] for *_, tokens in documents)
    names = {f"shard-{s:05d}-of-{shards:05d}.{kind}" for s in range(shards) for kind in ("npy", "index")}
    assert set(content(tmp_path / "out")) == names | {MANIFEST, "tokenizer.json"}


def test_two_processes_and_separate_jobs_write_the_same_bytes(config, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        write(config, tmp_path / name, processes=processes, shards=3, no_duplicates=True)
    results = [write(config, tmp_path / "jobs", part=(i, 2), shards=3, no_duplicates=True) for i in (1, 0)]
    assert [r["complete"] for r in results] == [False, True]
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "jobs")
    assert write(config, tmp_path / "one", shards=3, no_duplicates=True) == results[1] | {
        "out": str(tmp_path / "one"), "shards_of_this_job": 3}


def test_the_held_out_documents_are_the_same_from_any_format_and_sharding(config, tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"label{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / f"label{i % 3}" / f"{i}.txt").write_text(text)
    write(config, tmp_path / "a", shards=2)
    write(changed(config, path=str(tmp_path / "folder")), tmp_path / "b", shards=3)
    held_out = [sorted((label, tokens) for label, held_out, _, tokens in read(tmp_path / out) if held_out) for out in "ab"]
    assert held_out[0] == held_out[1] and len(held_out[0]) > 40
    write(dataclasses.replace(config, seed=SEED + 1), tmp_path / "c")
    assert sorted((d[0], d[3]) for d in read(tmp_path / "c") if d[1]) != held_out[0]


@pytest.mark.parametrize("shards", [1, 4])
def test_of_documents_with_the_same_text_only_the_first_is_written(config, tmp_path, texts, shards):
    write_jsonl(tmp_path / "twice.jsonl", [*texts[:60], *texts[30:90], *texts[:30]])
    twice = changed(config, path=str(tmp_path / "twice.jsonl"))
    result = write(twice, tmp_path / "out", shards=shards, no_duplicates=True)
    assert result["left_out"] == {"duplicate": 60} and result["documents"] == 90
    assert sorted(d[2] for d in read(tmp_path / "out")) == [*range(60), *range(90, 120)]


def test_lengths_and_labels_leave_documents_out_and_are_counted(config, tmp_path):
    low, high = np.percentile([len(t) - 1 for _, _, t in expected(config)], [25, 75]).astype(int).tolist()
    wanted = [(label, i, t) for label, i, t in expected(config) if label != "label1" and low <= len(t) - 1 <= high]
    result = write(changed(config, leave_out_labels="label1"), tmp_path / "out", shards=3, min_tokens=low,
                   max_tokens=high)
    assert without_held_out(read(tmp_path / "out")) == sorted(wanted)
    assert set(result["left_out"]) == {"label", "too_short", "too_long"}
    assert sum(result["left_out"].values()) == COUNT - len(wanted)
    with pytest.raises(InputError, match="no document of label 'label9'"):
        write(changed(config, leave_out_labels="label9"), tmp_path / "other")


class Records(Source):
    """Documents of token ids, of which number 3 cannot be read."""

    name, labels, fingerprint = "records", ["a"], "f"

    def __init__(self, eos, wrong=-1):
        self.eos, self.wrong = eos, wrong

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 3:
            raise InputError("records: document 3 is damaged")
        return Document("", "a", i, np.array([i, 999 if i == self.wrong else 7, self.eos], np.int32))


def test_token_ids_are_written_as_they_are_and_unreadable_documents_up_to_a_share(config, tmp_path):
    job = open_tokenization(changed(config, max_skipped=0.1), tmp_path / "out", shards=2)
    records = dataclasses.replace(job, source=Records(job.tokenizer.eos_id))
    assert tokenize(records, 1)["left_out"] == {"unreadable": 1}
    assert sorted(d[2:] for d in read(tmp_path / "out")) == [(i, [i, 7, job.tokenizer.eos_id]) for i in range(40) if i != 3]
    strict = dataclasses.replace(records, out=tmp_path / "strict", data=config.data)
    with pytest.raises(InputError, match=r"document 3 is damaged \(data.max_skipped=0.0"):
        tokenize(strict, 1)
    beyond = dataclasses.replace(records, out=tmp_path / "beyond", source=Records(job.tokenizer.eos_id, 30), data=config.data)
    with pytest.raises(InputError, match=r"document 30: token 1 is 999; expected ids in 0..\d+, those of .*tokenizer.json"):
        tokenize(beyond, 1, (1, 2))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed (extra `beam`)")
def test_beam_writes_the_same_bytes(config, tmp_path):
    beam = ["runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"]  # DirectRunner may download another
    path = command(config, tmp_path / "beam")[5]
    assert main(["data", "tokenize", path, "--out", str(tmp_path / "beam"), "--shards", "3", "--no-duplicates",
                 "--runner", "beam", *(f"--beam-option={option}" for option in beam)]) == 0
    write(config, tmp_path / "local", shards=3, no_duplicates=True)
    assert content(tmp_path / "beam") == content(tmp_path / "local")
    job = dataclasses.replace(open_tokenization(config, tmp_path / "wrong", shards=2), source=Records(0))
    with pytest.raises(InputError, match="document 3 is damaged"):
        tokenize(job, beam=beam)


def test_without_beam_the_extra_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(InputError, match=r"pip install 'emo-jax\[beam\]'"):
        tokenize(open_tokenization(config, tmp_path / "out"), beam=[])


def command(config, out, *arguments):
    path = out.parent / "config.py"
    path.write_text(f"from emo_jax.config import *\ndef config():\n    return {config!r}\n")
    return [sys.executable, "-m", "emo_jax", "data", "tokenize", str(path), "--out", str(out), *arguments]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from emo_jax.cli import main
from emo_jax.data.tokenizer import Tokenizer

encode, draw, out = Tokenizer.encode_batch, random.Random(1), Path(sys.argv[sys.argv.index("--out") + 1])
Tokenizer.encode_batch = lambda *args: (time.sleep(0.02), encode(*args))[1]
for _ in range(10):
    finished = lambda: len(list(out.glob("*.npy")))
    before = finished()
    child = os.fork()
    if not child:
        main(sys.argv[1:])
        os._exit(0)
    while finished() == before:
        time.sleep(0.001)
    time.sleep(0.1 * draw.random())
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(finished(), len(list(out.glob("unfinished/*.json"))) - 1)
"""


def test_ten_kills_lose_and_double_no_document(config, tmp_path):
    arguments = command(config, tmp_path / "killed", "--shards", "100", "--no-duplicates")
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments[3:], "--processes", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, complete = zip(*(map(int, line.split()) for line in done.stdout.splitlines()))
    assert 10 <= files[0] + 9 <= files[-1] < 100 and list(files) == sorted(files) and len(files) == 10
    assert all(f - c in (0, 1) for f, c in zip(files, complete))
    assert main([*arguments[3:], "--processes", "1"]) == 0
    write(config, tmp_path / "whole", shards=100, no_duplicates=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert without_held_out(read(tmp_path / "killed")) == sorted(expected(config))


def test_processes_end_with_the_one_that_started_them(config, tmp_path):
    arguments = command(config, tmp_path / "out", "--shards", "700", "--processes", "2")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)  # until nobody holds the other end any more
    assert len(list(tmp_path.glob("out/*.npy"))) < 700


def test_a_full_disk_is_said_and_counts_nothing_half_written(config, tmp_path):
    limited = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
               "from emo_jax.cli import main; sys.exit(main(sys.argv[1:]))")
    out = tmp_path / "full"
    open_source(config.data)  # the index of the source is written before
    arguments = command(config, out, "--shards", "1")
    done = subprocess.run([sys.executable, "-c", limited, *arguments[3:]], capture_output=True, text=True)
    assert done.returncode == 1 and "shard-00000-of-00001.npy cannot be written: File too large" in done.stderr
    assert not list(out.glob("shard*")) and not (out / MANIFEST).exists()
    assert main(arguments[3:]) == 0
    assert without_held_out(read(out)) == sorted(expected(config))


def test_a_source_that_goes_away_is_said(config, tmp_path):
    job = open_tokenization(config, tmp_path / "out")
    Path(config.data.path).unlink()
    with pytest.raises(RunError, match="d.jsonl: document 0 cannot be read: .*No such file"):
        tokenize(job, 1)


def test_a_folder_of_other_tokens_is_refused_and_the_tokenizer_is_recorded(config, tmp_path):
    out = tmp_path / "out"
    write(config, out, shards=2, part=(0, 2))
    with pytest.raises(InputError, match=r"made with seed=3 \(now 4\); give another folder"):
        write(dataclasses.replace(config, seed=4), out, shards=2)
    write(config, out, shards=2)
    manifest = parse_manifest((out / MANIFEST).read_text(), "manifest")
    assert manifest.tokenizer_sha256 == sha256((out / "tokenizer.json").read_bytes())
    assert (out / "tokenizer.json").read_bytes() == Path(config.data.tokenizer).read_bytes()
    with pytest.raises(InputError, match=r"made with shards=2 \(now 3\)"):
        write(config, out, shards=3)
    with pytest.raises(InputError, match="is tokenized already; expected documents"):
        write(changed(config, path=str(out)), tmp_path / "again")
    with pytest.raises(InputError, match="has 700 documents; expected at most one shard for each"):
        write(config, tmp_path / "many", shards=701)


@pytest.mark.parametrize(("kind", "change", "sizes_tell", "message"), [
    ("npy", lambda b: b[:-2], True, r"it has [\d,]+ bytes; manifest.json says [\d,]+ bytes"),
    ("index", lambda b: b + b"0", True, r"it has [\d,]+ bytes; manifest.json says [\d,]+ bytes"),
    ("npy", None, True, "there is no such file; manifest.json says"),
    ("npy", lambda b: bytes([b[0] ^ 1]) + b[1:], False, r"its SHA-256 is \w{64}; manifest.json says \w{64}"),
    ("index", lambda b: b[:-1] + b"1", False, r"its SHA-256 is \w{64}; manifest.json says \w{64}"),
])
def test_verify_names_the_file_that_is_wrong(config, tmp_path, capsys, kind, change, sizes_tell, message):
    out = tmp_path / "out"
    write(config, out, shards=3)
    assert main(["data", "verify", str(out)]) == 0 and "700 documents" in capsys.readouterr().out
    path = out / f"shard-00001-of-00003.{kind}"
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    assert main(["data", "verify", str(out), "--sizes"]) == (2 if sizes_tell else 0)
    assert main(["data", "verify", str(out)]) == 2
    assert re.search(f"{path}: {message}", capsys.readouterr().err)


def test_verify_refuses_another_tokenizer_and_a_folder_without_manifest(config, tmp_path, capsys):
    write(config, tmp_path / "out", shards=1)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    for folder, message in ((tmp_path / "out", "tokenizer.json: its SHA-256 is"), (tmp_path, "holds no manifest.json")):
        assert main(["data", "verify", str(folder), "--sizes"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["3/3", "1", "a/2", "-1/2"])
def test_a_wrong_part_of_the_work_is_refused(given, capsys):
    with pytest.raises(SystemExit) as e:
        main(["data", "tokenize", "emo_tiny", "--out", "x", f"--shard={given}"])
    assert e.value.code == 2 and "must be I/N such as 0/64" in capsys.readouterr().err
