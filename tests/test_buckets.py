"""Everything that a person can name by a path may be in a bucket: real S3 and GCS servers on loopback, which fail when
told to (`servers`)."""

import dataclasses
import os
import pickle
import threading
import time

import fsspec
import pytest
import servers
from servers import BUCKET, SCHEMES, Fault

from emo_jax.data.ranges import MERGED, PAGE, RangeReader, Retries
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
    data = os.urandom(64 * PAGE)
    url, reader = put("gs", "budget.bin", data), RangeReader(budget=4 * PAGE)
    assert reader.read(url, 0, len(data)) == data
    assert reader.statistics()["cached_bytes"] == 4 * PAGE
    before = reader.statistics()["requests"]
    assert reader.read(url, 60 * PAGE, 4 * PAGE) == data[60 * PAGE:] and reader.statistics()["requests"] == before
    assert reader.read(url, 0, 1) == data[:1] and reader.statistics()["requests"] == before + 1


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
    assert time.monotonic() - began < 3 and reader.statistics()["requests"] < 20
