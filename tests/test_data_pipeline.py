"""Batches: the same on every number of hosts and workers, exactly resumable, from documents that are not held out."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.evaluation import evaluation_rows
from emo_jax.data.order import DocumentOrder, TrainIndices, split
from emo_jax.data.pipeline import FIELDS, array_to_states, go_on, make_train_iterator, states_to_array, streams_of
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.errors import InputError, RunError

BATCH, LENGTH = 8, 64


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """(config, source, tokenizer) of a small JSONL with short, long and one-token documents."""
    folder = tmp_path_factory.mktemp("data")
    rng, words = np.random.default_rng(0), "alpha beta gamma delta epsilon zeta eta theta".split()
    with open(folder / "d.jsonl", "w") as file:
        for i in range(200):
            text = " ".join(rng.choice(words, rng.integers(1, 120))) if i % 10 else "a"
            file.write(json.dumps({"text": text, "source": f"label{i % 3}"}) + "\n")
    config = Config(name="t", model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=BATCH, eval_rows=12),
                    data=DataConfig(path=str(folder / "d.jsonl"), sequence_length=LENGTH, workers=0, eval_fraction=0.1,
                                    max_documents_per_row=6))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    source = open_source(config.data)
    return config, source, load_tokenizer(config, source, split(source, config.data, 0)[0], folder)


def change(config, **fields):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def batches(setup, count, hosts=1, states=None, **fields):
    """(global batches, all B states after them), computed by `hosts` hosts one after the other."""
    config, source, tokenizer = setup
    parts, ends = [], []
    for host in range(hosts):
        iterator = make_train_iterator(change(config, **fields), source, tokenizer, host, hosts, states)
        parts.append([next(iterator) for _ in range(count)])
        ends += iterator.state()
        iterator.close()
    return [{name: np.concatenate([part[k][name] for part in parts]) for name in FIELDS} for k in range(count)], ends


def assert_equal(one, other):
    assert len(one) == len(other)
    for k, (a, b) in enumerate(zip(one, other)):
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"batch {k}, {name}")


def test_fields_and_shapes(setup):
    (batch, second), _ = batches(setup, 2)
    assert set(batch) == set(FIELDS)
    for name, array in batch.items():
        assert array.shape == (BATCH, LENGTH) and array.dtype == (np.float32 if name == "loss_weights" else np.int32)
    assert (batch["positions"] == np.arange(LENGTH)).all()
    assert (second["tokens"] != batch["tokens"]).any()


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_batches_do_not_depend_on_hosts_or_workers(setup, packing):
    expected, states = batches(setup, 5, packing=packing)
    # 3 workers cannot share 8 rows evenly: 2 of them are used
    for run in (dict(hosts=2), dict(hosts=4), dict(hosts=8), dict(workers=2 if packing == "first_fit" else 3)):
        got, end = batches(setup, 5, packing=packing, **run)
        assert_equal(got, expected)
        assert end == states


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_resume_is_exact_on_another_number_of_hosts_and_workers(setup, packing):
    expected, _ = batches(setup, 7, packing=packing)
    head_workers, tail_workers = (2, 0) if packing == "first_fit" else (0, 2)
    head, states = batches(setup, 3, packing=packing, workers=head_workers)
    assert_equal(head, expected[:3])
    states = json.loads(json.dumps(states))
    data = change(setup[0], packing=packing).data
    gathered = np.concatenate([states_to_array(states[:4], data), states_to_array(states[4:], data)])
    assert array_to_states(gathered) == states
    for run in (dict(hosts=2), dict(hosts=1, workers=tail_workers)):
        assert_equal(batches(setup, 4, packing=packing, states=array_to_states(gathered), **run)[0], expected[3:])


def read_on(setup, batch_size, count, states, first, hosts=1, **fields):
    """(batches, states of all streams after them, the stream that is next), by hosts one after the other."""
    config, source, tokenizer = setup
    config = dataclasses.replace(change(config, **fields), train=TrainConfig(batch_size=batch_size))
    parts, after = [], {}
    for host in range(hosts):
        iterator = make_train_iterator(config, source, tokenizer, host, hosts, states, first=first)
        parts.append([next(iterator) for _ in range(count)])
        after |= zip(streams_of(batch_size, len(states), first, host, hosts), iterator.state())
        iterator.close()
    got = [{name: np.concatenate([part[k][name] for part in parts]) for name in FIELDS} for k in range(count)]
    return got, [after[stream] for stream in range(len(states))], (first + count * batch_size) % len(states)


RAMP = ((4, 3), (2, 1), (8, 1), (16, 1), (32, 1), (1, 4), (8, 1))  # (batch size, batches); the first batch had 8 rows


def test_any_batch_size_that_fits_reads_the_same_rows_on_any_number_of_hosts(setup):
    constant, _ = batches(setup, 11)
    rows, at = {name: np.concatenate([b[name] for b in constant]) for name in FIELDS}, 0
    states, first, elsewhere = [[0, 0]] * BATCH, 0, ([[0, 0]] * BATCH, 0)
    for size, count in RAMP:
        hosts = 1 if size == 1 else 2
        got, *after = read_on(setup, size, count, states, first)
        assert_equal(read_on(setup, size, count, *elsewhere, hosts, workers=2 * (size == 16))[0], got)
        for batch in got:
            expected = {name: a[at:at + size] for name, a in rows.items()}
            by_stream = np.argsort(np.arange(size) % min(size, BATCH), kind="stable")  # of several turns, streams go together
            assert_equal([batch], [{name: a[by_stream] for name, a in expected.items()}])
            at += size
        (states, first), elsewhere = after, after
    assert at % BATCH == first
    assert at == 82 and states == batches(setup, 11)[1][:2] + batches(setup, 10)[1][2:]


@pytest.mark.parametrize("before, after, left_out", [
    (dict(packing="concat_and_split"), dict(packing="concat_and_split", sequence_length=160), False),
    (dict(packing="concat_and_split"), dict(packing="first_fit", sequence_length=40), False),
    (dict(packing="first_fit"), dict(packing="first_fit", sequence_length=128), False),
    (dict(packing="first_fit"), dict(packing="concat_and_split"), True),
])
def test_other_rows_go_on_with_the_next_unread_token_of_every_stream(setup, before, after, left_out):
    config, source, tokenizer = setup
    head, states, _ = read_on(setup, BATCH, 2, [[0, 0]] * BATCH, 0, **before)
    on = [go_on(state, change(config, **before).data, change(config, **after).data) for state in states]
    assert (on != states) == left_out
    tail, end, _ = read_on(setup, BATCH, 2, on, 0, **after)
    seen = np.zeros(len(source), np.int64)
    for batch in head + tail:
        np.add.at(seen, batch["document_ids"][batch["segment_ids"] > 0], 1)
    order = DocumentOrder(split(source, config.data, 0)[0], BATCH, 0, True)
    for stream, (count, offset, *open_rows) in enumerate(end):
        for i in range(count):
            document = order.document(stream, i)
            whole = len(tokenizer.encode_document(source[document].text))
            assert seen[document] == whole or ((open_rows or left_out) and seen[document] < whole)
            seen[document] = 0
        if offset:
            assert seen[order.document(stream, count)] == offset
            seen[order.document(stream, count)] = 0
    assert not seen.any()


def test_the_state_is_that_of_the_batch_returned_last(setup):
    config, source, tokenizer = setup
    iterator = make_train_iterator(config, source, tokenizer)
    assert iterator.state() == [[0, 0]] * BATCH
    for k in range(3):
        next(iterator)
        time.sleep(0.05)  # let it prefetch
        assert iterator.state() == batches(setup, k + 1)[1]
    iterator.close()


def test_every_epoch_has_every_document_once_in_a_new_order():
    order = DocumentOrder(TrainIndices(23, np.array([0, 5, 22])), batch_size=6, seed=3, shuffle=True)
    stream = [order.document(k % 6, k // 6) for k in range(60)]
    epochs = [stream[:20], stream[20:40], stream[40:]]
    assert all(sorted(e) == [i for i in range(23) if i not in (0, 5, 22)] for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.epochs([5, 5, 5, 5, 0, 0]) == 1.0
    plain = DocumentOrder(TrainIndices(4, np.array([1])), batch_size=2, seed=3, shuffle=False)
    assert [plain.document(k % 2, k // 2) for k in range(6)] == [0, 2, 3, 0, 2, 3]


def test_batches_have_no_held_out_document_and_follow_the_seed(setup):
    config, source, tokenizer = setup
    _, held_out = split(source, config.data, config.seed)
    got, _ = batches(setup, 40)
    seen = {i for b in got for i in b["document_ids"][b["segment_ids"] > 0].tolist()}
    assert not seen & set(held_out.tolist()) and len(seen) > 100
    other, _ = batches((dataclasses.replace(config, seed=5), source, tokenizer), 1)
    assert (other[0]["tokens"] != got[0]["tokens"]).any()


def test_rows_are_the_documents(setup):
    _, source, tokenizer = setup
    (batch,), _ = batches(setup, 1, packing="first_fit")
    for row in range(BATCH):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            text = source[int(batch["document_ids"][row][at][0])].text
            piece = batch["tokens"][row][at].tolist()
            whole = tokenizer.encode_document(text).tolist()
            assert any(whole[i:i + len(piece)] == piece for i in range(len(whole)))


def test_repetitive_rows_carry_no_loss_and_are_counted(setup, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * 500 if i % 2 else f"{i} " * 30}) + "\n" for i in range(40)))
    config = change(setup[0], path=str(path), sequence_length=32, eval_fraction=0.0)
    source = open_source(config.data)
    for use in (True, False):
        iterator = make_train_iterator(change(config, repetition_filter=use, packing="first_fit"), source, setup[2])
        weights = np.concatenate([next(iterator)["loss_weights"] for _ in range(20)])
        assert iterator.statistics()["rows"] == len(weights)
        assert (iterator.statistics()["filtered_rows"] > 0) == use == bool((weights.max(1) == 0).any())
        iterator.close()


def test_a_batch_size_that_does_not_fit_the_streams_and_a_bad_process_count_are_refused(setup):
    config, source, tokenizer = setup
    with pytest.raises(InputError, match="train.batch_size=8: the run reads its documents in 12 streams.*a multiple of 12"):
        make_train_iterator(config, source, tokenizer, states=[[0, 0]] * 12)
    with pytest.raises(InputError, match="the 2 streams of documents.*cannot be shared evenly by the 4 processes"):
        make_train_iterator(config, source, tokenizer, 0, 4, states=[[0, 0]] * 2)
    with pytest.raises(InputError, match="must be a multiple of the 3 processes"):
        make_train_iterator(config, source, tokenizer, 0, 3)


def test_errors_in_a_worker_arrive_and_workers_end(setup, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a b c"}\n' * 50)
    config = change(setup[0], path=str(path), workers=1, eval_fraction=0.0)
    source = open_source(config.data)
    path.unlink()
    iterator = make_train_iterator(config, source, setup[2])
    with pytest.raises(RunError, match="No such file"):
        next(iterator)
    iterator.close()
    iterator = make_train_iterator(change(setup[0], workers=2), *setup[1:], states=[[0, 10_000]] * BATCH)
    with pytest.raises(InputError, match="not those that the checkpoint"):
        next(iterator)
    iterator.close()
    assert not [p for p in multiprocessing.active_children() if "prefetch" in p.name]


PROGRAM = """
import multiprocessing, os, signal, sys, time
from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer

if __name__ == "__main__":
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
    data = DataConfig(path=sys.argv[1], sequence_length=64, workers=2)
    config = Config(name="t", model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=8), data=data)
    iterator = make_train_iterator(config, open_source(data), Tokenizer(sys.argv[2], data.eos_token))
    next(iterator)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    while not terminated:
        next(iterator)
    for _ in range(200):
        next(iterator)
    print("goes on", "jax devices" if "jax._src.xla_bridge" in sys.modules and
          sys.modules["jax._src.xla_bridge"]._backends else "no devices", flush=True)
    time.sleep(60)
"""


def test_workers_outlive_sigterm_but_not_the_training_process(setup, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen([sys.executable, tmp_path / "program.py", setup[0].data.path, setup[2].path], env=env,
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "goes on no devices\n"
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 15
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the training process"
        time.sleep(0.1)


def _runs(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_evaluation_rows_are_held_out_and_of_one_label(setup):
    config, source, tokenizer = setup
    _, held_out = split(source, config.data, config.seed)
    result = evaluation_rows(config, source, tokenizer, held_out)
    assert [label for label, _ in result] == ["label0", "label1", "label2"]
    for label, rows in result:
        assert set(rows) == set(FIELDS) and 1 <= len(rows["tokens"]) <= 4
        documents = set(rows["document_ids"][rows["segment_ids"] > 0].tolist())
        assert documents <= set(held_out.tolist()) and {source.label(i) for i in documents} == {label}
    again = evaluation_rows(config, source, tokenizer, held_out)
    assert_equal([rows for _, rows in result], [rows for _, rows in again])
