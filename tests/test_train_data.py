"""What a run says about its data: losses and tokens by label, and how long it waited for which part."""

import json
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import records, tiny_config

from emo_jax import sharding
from emo_jax.data.jsonl import JsonlSource
from emo_jax.data.order import split
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.train import data_wait
from emo_jax.train.loop import train


def test_tokens_by_label_are_those_of_the_documents_and_losses_add_up(tmp_path):
    train(config := tiny_config(tmp_path, "train.steps=5", "train.log_every=2"), tmp_path / "run")
    source = open_source(config.data)
    tokenizer = load_tokenizer(config, source, split(source, config.data, 0)[0], tmp_path / "run")
    batches = make_train_iterator(config, source, tokenizer)
    labels = [json.loads(line)["source"] for line in Path(config.data.path).read_text().splitlines()]
    logged = records(tmp_path / "run")
    assert [r["step"] for r in logged] == [2, 4, 5]
    for record, steps in zip(logged, (2, 2, 1)):
        expected = Counter()
        for _ in range(steps):
            batch = next(batches)
            counted = batch["document_ids"][batch["loss_weights"] > 0].tolist()
            expected.update(labels[i] for i in counted)
        assert record["tokens_by_label"] == expected
        assert set(record["loss_by_label"]) == {"color", "count"} and 0 <= record["data_wait_fraction"] <= 1
    nats = sum(record["loss_by_label"][label] * n for label, n in record["tokens_by_label"].items())
    assert nats / record["loss_tokens"] == pytest.approx(record["loss"], rel=1e-6)  # of the last step alone
    batches.close()


@pytest.mark.parametrize("slow", ["read", "tokenize"])
def test_a_wait_is_blamed_on_the_part_that_is_slow(tmp_path, monkeypatch, slow):
    config = tiny_config(tmp_path, "train.batch_size=2")
    source = open_source(config.data)
    tokenizer = load_tokenizer(config, source, split(source, config.data, 0)[0], tmp_path)
    owner, method = (JsonlSource, "__getitem__") if slow == "read" else (Tokenizer, "encode_document")
    original = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda self, x: (time.sleep(0.01), original(self, x))[1])
    wait, mesh = data_wait.DataWait(), sharding.make_mesh(config, jax.devices()[:1])
    batches = make_train_iterator(config, source, tokenizer)
    began = time.monotonic()
    for _ in range(6):
        assert set(wait.next_batch(batches, mesh)) >= {"tokens", "labels"}
    wait.mark(time.monotonic() - began)
    assert wait.fraction > 0.5 and f"the slow part is {slow}" in wait.complaint()
    assert wait.complaint() is None  # said once
    wait.restart()
    wait.mark(1.0)
    assert wait.fraction == 0
    np.testing.assert_array_less(0, batches.timings())
    batches.close()
