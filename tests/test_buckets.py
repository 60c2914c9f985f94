"""Everything that a person can name by a path may be in a bucket: real S3 and GCS servers on loopback, which fail when
told to (`servers`)."""

import dataclasses
import gzip
import os
import pickle
import random
import re
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import servers
import zstandard
from servers import BUCKET, SCHEMES, Fault
from tiny_run import tiny_config, write_documents

from emo_jax.config import DataConfig
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.ranges import MERGED, PAGE, RangeReader, Retries
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer, train_bpe
from emo_jax.errors import InputError, RunError

QUICK = Retries(tries=3, seconds=0.01, timeout=5)


@pytest.fixture
def buckets():
    started = servers.with_buckets()
    yield started
    started.reset()


@pytest.fixture(params=SCHEMES)
def scheme(request, buckets):
    return request.param


def put(scheme: str, key: str, data: bytes) -> str:
    fsspec.filesystem(scheme).pipe_file(f"{BUCKET}/{key}", data)
    return f"{scheme}://{BUCKET}/{key}"


# ---- byte ranges ----


def test_ranges_of_an_object_are_those_of_a_file(scheme, tmp_path):
    data = os.urandom(5 * PAGE + 1000)
    url, path = put(scheme, "ranges.bin", data), tmp_path / "ranges.bin"
    path.write_bytes(data)
    parts = [(0, 10), (PAGE - 5, 10), (3 * PAGE, 2 * PAGE + 1000), (5 * PAGE + 990, 10), (7, 0), (0, len(data))]
    reader = RangeReader()
    assert reader.read_many([(url, *p) for p in parts]) == reader.read_many([(str(path), *p) for p in parts])
    assert reader.size(url) == reader.size(str(path)) == len(data)
    assert pickle.loads(pickle.dumps(reader)).read(url, 1, 2) == data[1:3]


def test_a_known_size_saves_the_request_that_would_find_the_end(scheme, buckets):
    url = put(scheme, "known.bin", bytes(PAGE + 7))
    for sizes, requests in (({}, 2), ({url: PAGE + 7}, 1)):
        reader = RangeReader(sizes=sizes)
        assert len(reader.read(url, 10, PAGE - 3)) == PAGE - 3 and reader.statistics()["requests"] == requests
    with pytest.raises(InputError, match=f"the object ends at byte {PAGE + 7}, before byte {2 * PAGE}"):
        RangeReader(sizes={url: 2 * PAGE}).read(url, 0, 2 * PAGE)  # it was longer when it was listed


def test_near_pages_are_one_request_and_kept_ones_none(buckets):
    url, reader = put("s3", "near.bin", bytes(MERGED + 20 * PAGE)), RangeReader()
    ranges = [(url, i * 2 * PAGE, 10) for i in range(8)] + [(url, 18 * PAGE, 10)]
    reader.read_many(ranges)
    assert buckets.proxies["s3"].reads("near.bin") == 2  # a gap of one page is read too, one of three is not
    reader.read_many(ranges[::-1])
    assert buckets.proxies["s3"].reads("near.bin") == reader.statistics()["requests"] == 2
    reader.read(url, 0, MERGED + 10 * PAGE)
    assert reader.statistics()["requests"] == 3 and reader.statistics()["fetched_bytes"] < MERGED + 40 * PAGE


def test_pages_stay_within_the_budget(buckets):
    data = os.urandom(4 * MERGED)
    url, reader = put("gs", "budget.bin", data), RangeReader(budget=2 * MERGED + PAGE)
    assert reader.read(url, 0, len(data)) == data
    assert reader.statistics()["cached_bytes"] == 2 * MERGED
    before = reader.statistics()["requests"]
    assert reader.read(url, 2 * MERGED, MERGED) == data[2 * MERGED:3 * MERGED] and reader.statistics()["requests"] == before
    assert reader.read(url, 0, 1) == data[:1] and reader.statistics()["requests"] == before + 1
    assert reader.read(url, MERGED, MERGED) == data[MERGED:2 * MERGED]  # now the last block goes, not the one used since
    assert reader.read(url, 2 * MERGED, 1) == data[2 * MERGED:][:1] and reader.statistics()["requests"] == before + 2
    assert reader.statistics()["cached_bytes"] <= 2 * MERGED + PAGE
    for start in random.Random(0).choices(range(len(data) - 3 * PAGE), k=200):  # blocks that overlap
        assert reader.read(url, start, 3 * PAGE) == data[start:start + 3 * PAGE]
    assert 0 < reader.statistics()["cached_bytes"] <= 2 * MERGED + PAGE


def test_threads_share_what_one_of_them_is_reading(buckets):
    data, results = os.urandom(4 * PAGE), []
    url, reader = put("gs", "threads.bin", data), RangeReader()
    buckets.proxies["gs"].delay = 0.1
    threads = [threading.Thread(target=lambda i=i: results.append(reader.read(url, i, 2 * PAGE) == data[i:i + 2 * PAGE]))
               for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert results == [True] * 8 and buckets.proxies["gs"].reads("threads.bin") <= 2


@pytest.mark.parametrize("fault", [Fault("retry.bin", 2, status=429), Fault("retry.bin", 2, status=500),
                                   Fault("retry.bin", 2, status=503), Fault("retry.bin", 2, cut=True),
                                   Fault("retry.bin", 1, seconds=0.6)], ids=["429", "500", "503", "cut", "late"])
def test_what_may_pass_is_tried_again_and_named(scheme, buckets, fault, caplog):
    data = os.urandom(3 * PAGE)
    url, reader = put(scheme, "retry.bin", data), RangeReader(retries=dataclasses.replace(QUICK, timeout=0.3))
    fault = dataclasses.replace(fault)
    buckets.proxies[scheme].faults, times = [fault], fault.times
    assert reader.read(url, 5, 2 * PAGE) == data[5:5 + 2 * PAGE]
    named = [r.getMessage() for r in caplog.records if url in r.getMessage()]
    assert len(named) == times == reader.statistics()["retries"] and "bytes 0.." in named[0]


def test_what_does_not_pass_names_object_range_and_error(scheme, buckets):
    url = put(scheme, "broken.bin", bytes(PAGE))
    buckets.proxies[scheme].faults = [Fault("broken.bin", 100, status=503)]
    with pytest.raises(RunError, match=rf"{url} bytes 0\.\.\d+: cannot be read after 3 tries.*503"):
        RangeReader(retries=QUICK).read(url, 0, 10)
    assert buckets.proxies[scheme].reads("broken.bin") == 3
    buckets.proxies[scheme].faults = [Fault("broken.bin", 100, status=403)]
    with pytest.raises(InputError, match=f"{url}.*PERMISSION_DENIED"):
        RangeReader(retries=QUICK).read(url, 0, 10)
    assert buckets.proxies[scheme].reads("broken.bin") == 4


@pytest.mark.parametrize("start", [PAGE - 10, 3 * PAGE])
def test_an_object_that_became_shorter_is_an_error_at_once(scheme, buckets, start):
    url, reader = put(scheme, "short.bin", bytes(PAGE + 5)), RangeReader(retries=QUICK)
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{url}: the object ends at byte .* before byte {start + 200}"):
        reader.read(url, start, 200)
    with pytest.raises(InputError, match=f"{url}x: no such object"):
        reader.read(url + "x", 0, 1)
    assert time.monotonic() - began < 2 and reader.statistics()["retries"] == 0


def test_a_read_takes_what_delay_and_bandwidth_ask_for(buckets):
    """1,024 parts of 16 KB in random places, with 50 ms a request: not one after another."""
    url, reader = put("s3", "cold.bin", bytes(32 << 20)), RangeReader()
    buckets.proxies["s3"].delay = 0.05
    began = time.monotonic()
    reader.read_many([(url, i * 7919 * 4096 % (31 << 20), 16 << 10) for i in range(1024)])
    assert time.monotonic() - began < 10 and reader.statistics()["requests"] < 20


# ---- documents and tokenizers ----


def put_folder(scheme: str, folder: Path, key: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            put(scheme, f"{key}/{path.relative_to(folder)}", path.read_bytes())
    return f"{scheme}://{BUCKET}/{key}"


def documents(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    write_documents(folder / "all.jsonl", 60)
    lines = (folder / "all.jsonl").read_bytes()
    (folder / "all.jsonl").unlink()
    for name in ("one", "two"):
        (folder / name).mkdir()
        if kind == "text":
            for i, line in enumerate(lines.splitlines()[:4]):
                (folder / name / f"{i}.txt").write_bytes(line)
        else:
            data = gzip.compress(lines) if kind == "jsonl.gz" else zstandard.compress(lines) if kind == "jsonl.zst" else lines
            (folder / name / f"part.{kind}").write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "text"])
def test_documents_of_a_bucket_are_those_of_a_folder(scheme, buckets, tmp_path, kind, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = documents(tmp_path / "texts", kind)
    url = put_folder(scheme, folder, f"texts-{kind}")
    local, there = (open_source(DataConfig(path=str(path))) for path in (folder, url))
    assert [local[i] for i in range(len(local))] == [there[i] for i in range(len(there))]
    assert (local.labels, local.fingerprint) == (there.labels, there.fingerprint)
    assert (f"{url}/one/part.{kind} is compressed" in capsys.readouterr().err) == (kind in ("jsonl.gz", "jsonl.zst"))
    copied = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("data.jsonl"))
    assert bool(copied) == (kind in ("jsonl.gz", "jsonl.zst"))
    pattern = "*.txt" if kind == "text" else "part*"
    assert len(open_source(DataConfig(path=f"{url}/*/{pattern}"))) == len(local)
    copy = pickle.loads(pickle.dumps(there))
    assert copy[3] == local[3]


def test_batches_of_a_bucket_are_those_of_a_folder(scheme, tmp_path):
    config = tiny_config(tmp_path)
    source = open_source(config.data)
    tokenizer = train_bpe(source, range(len(source)), 320, tmp_path, "<|endoftext|>")
    there = open_source(DataConfig(path=put(scheme, "batches.jsonl", (tmp_path / "documents.jsonl").read_bytes())))
    workers = 1 if scheme == "gs" else 0  # a worker gets a copy of the source and opens it anew
    config_there = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    batches, batches_there = make_train_iterator(config, source, tokenizer), make_train_iterator(config_there, there, tokenizer)
    for _ in range(6):
        one, other = next(batches), next(batches_there)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    batches.close(), batches_there.close()


def test_a_bucket_is_listed_once_however_many_files(scheme, buckets, tmp_path):
    url = put_folder(scheme, documents(tmp_path, "jsonl"), "listed")
    open_source(DataConfig(path=url))
    buckets.reset()
    source = open_source(DataConfig(path=url))
    assert [source[i] for i in range(len(source))]
    kinds = [(method, "part.jsonl" in path) for method, path, _ in buckets.proxies[scheme].requests]
    assert kinds.count(("GET", True)) == 2 and ("HEAD", True) not in kinds  # each file is read once
    assert len(kinds) <= 8


def test_a_listing_or_scan_survives_what_may_pass(scheme, buckets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = put_folder(scheme, documents(tmp_path / "texts", "jsonl"), "flaky")
    buckets.proxies[scheme].faults = [Fault("part.jsonl", 1, cut=True), Fault("", 1, status=503), Fault("flaky", 1, status=429)]
    assert len(open_source(DataConfig(path=url))) == 120


def test_what_is_not_in_a_bucket_is_named(scheme, tmp_path):
    url = put_folder(scheme, documents(tmp_path, "jsonl"), "named")
    for given, message in ((f"{url}x", "no such file or folder"), (f"{url}/*.gz", "no file matches"),
                           ("http://x/y", "URL of another kind"), ("s3://", "the name of a bucket")):
        with pytest.raises(InputError, match=re.escape(given) + ".*" + message):
            open_source(DataConfig(path=given))
    bad = put(scheme, "named/bad.jsonl", b'{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(InputError, match=f"{bad}: line 2: field 'text' is a int"):
        open_source(DataConfig(path=url))


def test_a_tokenizer_of_a_bucket_is_read_once(scheme, buckets, tmp_path):
    source = open_source(DataConfig(path=str(write_documents(tmp_path / "d.jsonl"))))
    local = train_bpe(source, range(10), 300, tmp_path, "<|endoftext|>")
    put(scheme, "vocabulary/tokenizer.json", local.content)
    buckets.reset()
    folder = f"{scheme}://{BUCKET}/vocabulary"
    tokenizer = Tokenizer(folder, "<|endoftext|>")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("red green").tolist() == local.encode("red green").tolist()
    whole = "alt=media" if scheme == "gs" else "/vocabulary/tokenizer.json"
    assert buckets.proxies[scheme].reads(whole) == 1
    with pytest.raises(InputError, match=f"{folder}/nope.json.*no such file"):
        Tokenizer(f"{folder}/nope.json", "<|endoftext|>")
    trained = train_bpe(source, range(10), 300, f"{scheme}://{BUCKET}/trained", "<|endoftext|>")
    assert trained.content == local.content == fsspec.filesystem(scheme).cat_file(f"{BUCKET}/trained/tokenizer.json")
