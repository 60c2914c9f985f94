"""Every source of documents, and what `emo-jax data tokenize` writes, in buckets: the same as on a local disk."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
import tensorflow_datasets as tfds
import test_data_columns as table_files
from servers import BUCKET, SCHEMES, Fault
from tiny_run import write_documents

from emo_jax import files
from emo_jax.cli import main
from emo_jax.config import Config, DataConfig, ModelConfig
from emo_jax.data import tokenization
from emo_jax.data.ranges import PAGE
from emo_jax.data.shards import sha256
from emo_jax.data.sources import open_source
from emo_jax.data.tokenize import open_tokenization, tokenize
from emo_jax.data.tokenizer import train_bpe
from emo_jax.errors import InputError, RunError

METHOD = {"s3": "PUT", "gs": "POST"}  # that writes


@pytest.fixture
def buckets():
    started = servers.with_buckets()
    yield started
    started.reset()


@pytest.fixture(params=SCHEMES)
def scheme(request, buckets):
    return request.param


@pytest.fixture
def key(request):
    return f"{BUCKET}/{request.node.name.partition('[')[0]}"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def put_folder(scheme: str, folder: Path, key: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            fsspec.filesystem(scheme).pipe_file(f"{key}/{path.relative_to(folder)}", path.read_bytes())
    return f"{scheme}://{key}"


def content(out) -> dict[str, bytes]:
    """By name, whatever is below a folder or URL."""
    root, found = files.list_files(str(out))
    return {str(f.path.relative_to(root)): f.path.read_bytes() for f in found}


def read_elsewhere(url: str) -> list:
    """[[[text, label] of every document], fingerprint], read in a process of its own: array_record's reader may keep Python
    from running while it waits for an answer, and the servers' proxies run here."""
    done = subprocess.run([sys.executable, "-c", _READ, url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_READ = """
import json, sys
from emo_jax.config import DataConfig
from emo_jax.data.sources import open_source
source = open_source(DataConfig(path=sys.argv[1]))
documents = [source[i] for i in range(len(source))]
print(json.dumps([[[d.text, d.label] for d in documents], source.fingerprint]))
"""


# ---- what is read ----


@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "saved", "dict", "json"])
def test_documents_of_a_bucket_are_those_of_a_folder(scheme, buckets, key, tmp_path, kind):
    folder = table_files.write(kind, tmp_path)
    url = put_folder(scheme, tmp_path, f"{key}-{kind}") + str(folder).removeprefix(str(tmp_path))
    if kind == "json" and scheme == "s3":
        with pytest.raises(InputError, match=f"{url}/c4.*: ArrayRecord files are read from local disks and gs:// only"):
            open_source(DataConfig(path=url))
        return
    if kind == "json":
        local = open_source(DataConfig(path=str(folder)))
        assert read_elsewhere(url) == [[[d.text, d.label] for d in (local[i] for i in range(len(local)))], local.fingerprint]
        return
    local, there = (open_source(DataConfig(path=str(path))) for path in (folder, url))
    assert [local[i] for i in range(len(local))] == [there[i] for i in range(len(there))]
    assert (local.labels, local.fingerprint) == (there.labels, there.fingerprint)
    assert pickle.loads(pickle.dumps(there))[63] == local[63]


def tall(kind: str, path: Path, rows: int = 400) -> Path:
    """A file of 4 MB: long texts in ten blocks, beside a column that nobody asks for."""
    rng = np.random.default_rng(0)
    made = pa.table({"text": [rng.bytes(2_500).hex() for _ in range(rows)], "source": ["a"] * rows,
                     "other": [rng.bytes(5_000) for _ in range(rows)]})
    if kind == "parquet":
        pq.write_table(made, path, row_group_size=rows // 10, use_dictionary=False)
    else:
        open_writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as out, open_writer(out, made.schema) as writer:
            writer.write_table(made, max_chunksize=rows // 10)
    return path


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_only_what_is_asked_for_is_read(scheme, buckets, key, tmp_path, kind):
    path = tall(kind, tmp_path / ("d.parquet" if kind == "parquet" else "d.arrow"))
    url = put_folder(scheme, tmp_path, f"{key}-{kind}")
    buckets.reset()
    local, there = open_source(DataConfig(path=str(path))), open_source(DataConfig(path=url))
    opened, reader = there._reader.statistics(), there._reader
    assert opened["fetched_bytes"] < (0.1 if kind == "parquet" else 0.4) * path.stat().st_size
    assert there[105] == local[105] and there[101] == local[101]
    more = reader.statistics()["fetched_bytes"] - opened["fetched_bytes"]
    assert more < (2 if kind == "parquet" else 4) * 40 * 5_000 + 4 * PAGE
    requests = buckets.proxies[scheme].requests
    assert ("HEAD", True) not in [(method, path.name in asked) for method, asked, _ in requests]
    if kind == "stream":  # where the batches lie is known from now on
        again = open_source(DataConfig(path=url))
        assert again._reader.statistics()["fetched_bytes"] <= 3 * PAGE and again[399] == local[399]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_shorter_object_is_named_when_it_is_opened_and_when_it_is_read(scheme, key, tmp_path, kind):
    path = tall(kind, tmp_path / ("d.parquet" if kind == "parquet" else "d.arrow"))
    url, data = put_folder(scheme, tmp_path, f"{key}-{kind}") + f"/{path.name}", path.read_bytes()
    there = open_source(DataConfig(path=url))
    fsspec.filesystem(scheme).pipe_file(url, data[:len(data) // 2])
    with pytest.raises(InputError, match=f"{url}: not a complete (Parquet|Arrow) file"):
        open_source(DataConfig(path=url))
    with pytest.raises(InputError, match=f"{url}: the object ends at byte .* it was cut off, or changed while in use"):
        pickle.loads(pickle.dumps(there))[399]


def test_a_saved_dataset_that_lacks_a_file_is_named(scheme, key, tmp_path):
    folder = table_files.write("dict", tmp_path)
    (folder / "train" / "data-00001-of-00002.arrow").unlink()
    url = put_folder(scheme, folder, key)
    with pytest.raises(InputError, match=f"{url}/train/data-00001-of-00002.arrow: no such file, though the dataset names it"):
        open_source(DataConfig(path=url))
    with pytest.raises(InputError, match=r"has the splits \['train', 'test'\]"):
        open_source(DataConfig(path=url, tfds_split="validation"))


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "text": tfds.features.Text(), "source": tfds.features.ClassLabel(names=["x", "y"])}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((i, {"text": f"document {i}", "source": i % 2}) for i in range(20))


def test_a_tfds_dataset_is_read_from_gs_and_refused_from_s3(scheme, key, tmp_path):
    builder = Tiny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    folder = Path(str(builder.data_path))
    local, url = open_source(DataConfig(path=str(folder))), put_folder(scheme, folder, f"{key}/tiny/1.0.0")
    if scheme == "s3":
        with pytest.raises(InputError, match=f"{url}: ArrayRecord files are read from local disks and gs:// only"):
            open_source(DataConfig(path=url))
        return
    assert read_elsewhere(url) == [[[d.text, d.label] for d in (local[i] for i in range(20))], local.fingerprint]


# ---- what is written ----


@pytest.fixture
def config(tmp_path) -> Config:
    (tmp_path / "texts").mkdir()
    path = write_documents(tmp_path / "texts" / "d.jsonl", 300)
    source = open_source(DataConfig(path=str(path)))
    tokenizer = train_bpe(source, range(50), 300, tmp_path / "tokenizer", "<|endoftext|>")
    return Config(name="t", model=ModelConfig(vocab_size=300),
                  data=DataConfig(path=str(path.parent), tokenizer=str(tokenizer.path), eval_fraction=0.1))


def at(config: Config, **fields) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def write(config, out, part=(0, 1), processes=1, **options):
    return tokenize(open_tokenization(config, out, no_duplicates=True, **options), processes, part)


def test_tokens_written_to_a_bucket_are_those_of_a_folder(scheme, buckets, key, config, tmp_path, capsys):
    """From documents in a bucket, by two jobs, while the server fails at times."""
    wanted = write(config, tmp_path / "local", shards=3)
    there = at(config, path=put_folder(scheme, tmp_path / "texts", f"{key}/texts"))
    proxy, out = buckets.proxies[scheme], f"{scheme}://{key}/out"
    proxy.faults = [Fault("shard-0000", 2, status=500, method=METHOD[scheme]), Fault("d.jsonl", 1, status=500)]
    results = [write(there, out, (i, 2), shards=3) for i in (1, 0)]
    assert [r["complete"] for r in results] == [False, True] and not any(fault.times for fault in proxy.faults)
    assert results[1] == wanted | {"out": out, "shards_of_this_job": 2}
    written = content(out)
    written["manifest.json"] = written["manifest.json"].replace(there.data.path.encode(), config.data.path.encode())
    assert written == content(tmp_path / "local")
    source = open_source(DataConfig(path=out))
    assert [d.tokens.tolist() for d in map(source.__getitem__, range(len(source)))] == [
        d.tokens.tolist() for d in map(open_source(DataConfig(path=str(tmp_path / "local"))).__getitem__, range(len(source)))]
    buckets.reset()
    assert main(["data", "verify", out]) == 0 and f"{wanted['documents']:,} documents" in capsys.readouterr().out
    listings = [path for method, path, _ in proxy.requests if method == "GET" and ("list-type" in path or "/o?" in path)]
    sizes = [path for method, path, _ in proxy.requests if method == "HEAD" and "shard" in path]
    assert len(listings) <= 6 and not sizes, proxy.requests
    fsspec.filesystem(scheme).pipe_file(f"{key}/out/shard-00001-of-00003.index", b"x")
    assert main(["data", "verify", out]) == 2 and "shard-00001-of-00003.index: it has 1 bytes" in capsys.readouterr().err


def test_documents_that_are_read_in_order_are_few_requests(scheme, buckets, key, tmp_path):
    """5 MB of them, of which one page after the other would be 40."""
    line = b'{"text": "' + b"red green " * 512 + b'"}\n'
    (tmp_path / "d.jsonl").write_bytes(line * 1000)
    source = open_source(DataConfig(path=put_folder(scheme, tmp_path, key)))
    tokenizer = train_bpe(source, range(2), 300, tmp_path, "<|endoftext|>")
    job = tokenization.Tokenization(pickle.loads(pickle.dumps(source)), tokenizer, tmp_path, 1, DataConfig(), 0)
    buckets.reset()
    assert len([job.read(i) for i in job.in_order(0)]) == 1000
    assert 2 <= buckets.proxies[scheme].reads("d.jsonl") <= 4


def test_a_killed_job_goes_on_in_a_bucket_with_what_it_lacks(scheme, buckets, key, config, tmp_path):
    write(config, tmp_path / "local", shards=4)
    out, path = f"{scheme}://{key}/out", tmp_path / "config.py"
    path.write_text(f"from emo_jax.config import *\ndef config():\n    return {config!r}\n")
    buckets.proxies[scheme].delay = 0.01
    process = subprocess.Popen([sys.executable, "-m", "emo_jax", "data", "tokenize", str(path), "--out", out, "--shards=4",
                                "--processes=1", "--no-duplicates"], stderr=subprocess.PIPE)
    def complete() -> int:
        return sum("shard-00002-of-00004.npy" in path for method, path, _ in buckets.proxies[scheme].requests)
    while not complete():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    buckets.reset()
    there = content(out)
    assert "manifest.json" not in there and "unfinished/shard-00001-of-00004.json" in there
    assert write(config, out, shards=4)["complete"] and content(out) == content(tmp_path / "local")
    assert not [path for method, path, _ in buckets.proxies[scheme].requests
                if method == METHOD[scheme] and "shard-00001-of-00004" in path]


def test_a_file_is_sent_in_blocks_and_is_there_when_it_is_complete(scheme, buckets, key, config, monkeypatch):
    block = 5 << 20 if scheme == "s3" else 1 << 18  # the smallest
    monkeypatch.setattr(tokenization, "BLOCK", block)
    out, blocks = f"{scheme}://{key}/out", [os.urandom(block // 2 + 1) for _ in range(5)]
    job = open_tokenization(config, out)

    def given():
        for block in blocks:
            assert "big" not in content(out)
            yield block

    buckets.proxies[scheme].faults = [Fault("big", 1, status=503, method=METHOD[scheme]),
                                      Fault("upload_id", 9, status=499, method="DELETE")]  # as GCS says that it cancelled
    assert tokenization.put(job, "big", given()) == sha256(b"".join(blocks))
    assert content(out)["big"] == b"".join(blocks)

    def stopped():
        yield from blocks
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenization.put(job, "half", stopped())
    assert "half" not in content(out)


def test_a_bucket_that_cannot_be_written_is_named_and_holds_no_half_of_a_shard(scheme, buckets, key, config):
    out = f"{scheme}://{key}/out"
    job = open_tokenization(config, out, shards=2)
    buckets.proxies[scheme].faults = [Fault("shard-00001", 1000, status=403, method=method) for method in ("PUT", "POST")]
    with pytest.raises(RunError, match=r"shard-00001-of-00002.npy: cannot be written \(.*the same command goes on"):
        tokenize(job, 1)
    buckets.reset()
    assert "shard-00001-of-00002.npy" not in content(out)
    assert tokenize(job, 1)["complete"]


def test_a_shard_without_documents_is_written_checked_and_read(scheme, buckets, key, config, tmp_path, capsys):
    """All that is short lies at the front, so that the first shards are empty."""
    lines = (tmp_path / "texts" / "d.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "texts" / "d.jsonl").write_bytes(b'{"text": "a"}\n' * 200 + b"".join(lines[:100]))
    for out in (str(tmp_path / "local"), f"{scheme}://{key}/out"):
        result = tokenize(open_tokenization(config, out, 3, 2), 1)
        assert result["documents"] == 100 and result["left_out"] == {"too_short": 200}
        assert content(out)["shard-00000-of-00003.npy"] == content(out)["shard-00001-of-00003.index"] == b""
        assert main(["data", "verify", out]) == 0 and main(["data", "inspect", "emo_tiny", f"--data.path={out}"]) == 0
        source = open_source(DataConfig(path=out))
        assert len(source) == 100 and source.source_number(0) >= 200 and len(source[99].tokens) > 5
    assert content(tmp_path / "local") == content(out)
