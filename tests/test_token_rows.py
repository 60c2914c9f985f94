"""Rows of token files: addressed by index, each document once an epoch, the same for every batch size and number of hosts."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from token_shards import EOS, documents, tokenizer_file, write_shards

from emo_jax.config import Config, DataConfig, ModelConfig
from emo_jax.data import blocks, rows
from emo_jax.data.mixture import MIXED, Mixture, fixed_counts
from emo_jax.data.olmo import open_olmo, read_mix
from emo_jax.data.stream import RowStream
from emo_jax.data.token_batches import TokenBatches
from emo_jax.data.tokens import open_shards
from emo_jax.errors import InputError, RunError
from emo_jax.files import list_files

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of three labels, one label held out in part."""
    path = tmp_path_factory.mktemp("tokens")
    os.environ["XDG_CACHE_HOME"] = str(path / "cache")
    return write_shards(path / "data", [
        {("web", False): documents(0, 900), ("math", False): documents(1, 300), ("web", True): documents(2, 20)},
        {("web", False): documents(3, 400), ("code", False): documents(4, 200, longest=400)}])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("emo_jax.data.cuts.BLOCK_TOKENS", 2048)
    monkeypatch.setattr(rows, "BLOCK_TOKENS", 2048)
    monkeypatch.setattr(blocks, "WINDOW_BLOCKS", 4)


def config(folder, vocab_size=300, **data) -> Config:
    given = dict(path=str(folder), sequence_length=LENGTH, max_documents_per_row=32)
    return Config(name="t", model=ModelConfig(vocab_size=vocab_size), data=DataConfig(**given | data))


def stream(folder, before=None, **data) -> RowStream:
    c = config(folder, **data)
    return RowStream(c, open_shards(c.data), before)


def epoch(s: RowStream, number: int = 0) -> dict[str, np.ndarray]:
    count = s.layouts[0].count
    return s.rows(np.arange(number * count, (number + 1) * count))


@pytest.mark.parametrize("packing", ["concat_and_split", "best_fit"])
def test_an_epoch_holds_every_token_of_every_training_document_once_and_none_that_is_held_out(folder, packing):
    s = stream(folder, packing=packing)
    source = s.source
    for number in (0, 1):
        got = epoch(s, number)
        real = got["segment_ids"] > 0
        ids, tokens = got["document_ids"][real], got["tokens"][real].astype(np.int64)
        for section, first in zip(source.sections, source.first_documents):
            for i in range(first, first + section.documents):
                wanted = np.zeros(0) if section.held_out else source.encoded(i, source.tokenizer)
                np.testing.assert_array_equal(np.sort(tokens[ids == i]), np.sort(wanted))


def test_a_row_is_a_stretch_of_its_documents_with_their_boundaries_labels_and_targets(folder):
    s = stream(folder)
    got = epoch(s)
    for i in range(len(got["tokens"])):
        n = int((got["segment_ids"][i] > 0).sum())
        tokens, segments = got["tokens"][i, :n], got["segment_ids"][i, :n]
        np.testing.assert_array_equal(segments, 1 + np.concatenate([[0], np.cumsum(tokens[:-1] == EOS)]))
        np.testing.assert_array_equal(got["targets"][i, :n - 1], tokens[1:])
        assert (np.diff(got["document_ids"][i, :n]) == np.diff(segments)).all()
        assert {s.source.label(int(d)) for d in got["document_ids"][i, :n]} == {s.source.labels[got["labels"][i, 0]]}


def test_the_last_target_is_the_next_token_of_the_file(folder):
    s = stream(folder)
    got, follows = epoch(s), {}
    for section in s.source.sections:
        number = s.source.sections.index(section)
        every = s.source.read([(number, 0, section.tokens)])[0]
        for start in range(0, section.tokens, LENGTH):
            follows[every[start:start + LENGTH].tobytes()] = every[start + LENGTH] if start + LENGTH < section.tokens else None
    for tokens, targets, weights, segments in zip(got["tokens"], got["targets"], got["loss_weights"], got["segment_ids"]):
        n = (segments > 0).sum()
        next_token = follows[tokens[:n].astype("<u2").tobytes()]
        assert weights[n - 1] == (next_token is not None) and targets[n - 1] == (next_token or 0)


def test_rows_of_an_epoch_come_in_another_order_in_the_next(folder):
    s = stream(folder)
    first, second = epoch(s)["document_ids"][:, 0], epoch(s, 1)["document_ids"][:, 0]
    assert sorted(first) == sorted(second) and (first != second).mean() > 0.9
    assert (epoch(stream(folder), 1)["document_ids"][:, 0] == second).all()


def test_successive_rows_come_from_the_few_blocks_of_a_window(folder):
    s = stream(folder)
    order = s.layouts[0].order
    located, _ = order.locate(np.arange(order.count))
    distinct = [len(np.unique(located[i:i + 128])) for i in range(0, order.count - 128, 128)]  # a window has 4 x 32 rows
    assert max(distinct) <= 2 * blocks.WINDOW_BLOCKS + 2 < len(np.unique(located)) / 2
    assert len(np.unique(np.diff(located[:64]))) > 3  # and rows are mixed within it


@pytest.mark.parametrize("packing", ["concat_and_split", "best_fit"])
def test_every_batch_size_number_of_hosts_and_restart_reads_the_same_sequence_of_rows(folder, packing):
    s = stream(folder, packing=packing)
    expected = s.rows(np.arange(48))
    for plan in ([(24, 1)] * 2, [(24, 4)] * 2, [(4, 1), (8, 2), (16, 4), (20, 1)]):
        first, got = 0, []
        for batch, hosts in plan:
            parts = [TokenBatches(stream(folder, packing=packing), first, batch, (h, hosts), threads=2) for h in range(hosts)]
            got.append(np.concatenate([next(part)["tokens"] for part in parts]))
            first = parts[0].rows_read
            for part in parts:
                part.close()
        np.testing.assert_array_equal(np.concatenate(got), expected["tokens"])


def test_best_fit_cuts_only_documents_longer_than_a_row_and_pads_little(folder):
    s = stream(folder, packing="best_fit")
    got = epoch(s)
    assert (got["segment_ids"] == 0).mean() < 0.06
    short = [i for i in range(len(s.source)) if len(s.source.encoded(i, s.source.tokenizer)) <= LENGTH]
    for i in short[::20]:
        assert len(np.unique(np.nonzero(got["document_ids"] == i)[0])) <= 1 or i == 0
    assert (got["loss_weights"][got["segment_ids"] == 0] == 0).all()


def test_a_row_holds_at_most_the_documents_allowed_and_what_it_leaves_out_is_counted(folder):
    s = stream(folder, max_documents_per_row=2)
    batches = TokenBatches(s, 0, 64)
    got = next(batches)
    assert got["segment_ids"].max() == 2
    cut = sum(c.beyond > 0 for c in s.cuts(np.arange(64)))
    assert cut > 0 and batches.statistics()["rows_at_document_limit"] == cut
    batches.close()


def test_repetitive_rows_are_masked_or_dropped(tmp_path):
    part = documents(5, 300)
    part[10] = np.append(np.tile([7, 8], 80), EOS)
    folder = write_shards(tmp_path / "t", [{("a", False): part}])
    masked, dropped = epoch(stream(folder)), epoch(stream(folder, repetitive_rows="dropped"))
    bad = (masked["loss_weights"] == 0).all(axis=1)
    assert bad.any()
    assert sorted(map(bytes, dropped["tokens"])) == sorted(map(bytes, masked["tokens"][~bad]))
    assert (epoch(stream(folder, repetition_filter=False))["loss_weights"].max(axis=1) == 1).all()


def test_a_token_beyond_the_vocabulary_is_named_with_its_file_and_place(folder):
    c = config(folder, vocab_size=299)
    source = open_shards(c.data)
    with pytest.raises(InputError, match=r"shard-0000\d-of-00002.npy: token [\d,]+ is 299, beyond the vocabulary"):
        RowStream(c, source).rows(np.arange(500))


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_a_stage_with_the_same_rows_goes_on_at_the_next_row(folder):
    first = stream(folder)
    second = stream(folder, before=(first, 100))
    np.testing.assert_array_equal(second.rows(np.arange(50))["tokens"], first.rows(np.arange(100, 150))["tokens"])


def test_a_stage_of_another_length_reads_nothing_that_was_read_before(folder):
    first = stream(folder)
    second = stream(folder, before=(first, 100), sequence_length=128)

    def spans(s, numbers):
        return {(cut.section, token) for cut in s.cuts(numbers) for start, n in cut.reads
                for token in range(start, start + n - 1)}

    left = second.layouts[0].count - second.mixture.read(0)[0]
    before, after = spans(first, np.arange(100)), spans(second, np.arange(left))
    assert not before & after
    total = sum(x.tokens for x in first.source.sections if not x.held_out)
    assert len(before) + len(after) > total - 2 * 4 * 2048  # all but the rest of one window


def test_a_label_that_a_stage_leaves_out_goes_on_where_it_was_left(folder):
    first = stream(folder, mixture="web:1,math:1")
    second = stream(folder, before=(first, MIXED), mixture="web:1,code:1")
    third = stream(folder, before=(second, 2 * MIXED), mixture="web:1,math:1,code:1")
    assert dict(zip(third.labels, third.mixture.read(0).tolist())) == {"web": 1536, "math": 512, "code": 1024}
    assert stream(folder, before=(stream(folder), 100), leave_out_labels="math").mixture.read(0).tolist() == [0]


# ---- mixtures -------------------------------------------------------------------------------------------------------


def test_a_mixture_has_fixed_numbers_of_rows_of_each_label_evenly_spread(folder):
    s = stream(folder, mixture="web:0.5,math:0.3,code:0.2")
    labels = [s.source.labels[code] for code in s.rows(np.arange(2 * MIXED))["labels"][:, 0]]
    for start in range(0, 2 * MIXED, 64):
        part = labels[start:start + 64]
        assert abs(part.count("web") - 32) <= 1 and abs(part.count("math") - 0.3 * 64) <= 1.2
    assert [labels[:MIXED].count(name) for name in ("web", "math", "code")] == [512, 307, 205]


def test_a_label_of_a_mixture_is_read_without_repetition_within_an_epoch(folder):
    s = stream(folder, mixture="web:1,math:1")
    math = s.labels.index("math")
    which, positions = s.mixture.locate(np.arange(4 * MIXED))
    np.testing.assert_array_equal(positions[which == math], np.arange((which == math).sum()))
    count = s.layouts[math].count
    got = [cut.reads[0] for cut in s.layouts[math].cuts(np.arange(count))]
    assert len(set(got)) == count


def test_weights_of_documents_are_weights_of_tokens_times_their_length(folder):
    s = stream(folder, mixture="web:1,code:1", mixture_unit="documents")
    of = {name: [x for x in s.source.sections if x.label == name and not x.held_out] for name in ("web", "code")}
    length = {name: sum(x.tokens for x in part) / sum(x.documents for x in part) for name, part in of.items()}
    read = dict(zip(s.labels, s.mixture.read(MIXED)))
    assert read["code"] / read["web"] == pytest.approx(length["code"] / length["web"], rel=0.01)


def test_a_label_that_was_read_max_epochs_times_leaves_and_the_others_take_its_place(folder):
    s = stream(folder, mixture="web:0.5,math:0.5", max_epochs=3)
    end = s.mixture.rows
    read = dict(zip(s.labels, s.mixture.read(end)))
    limits = {label: 3 * layout.count for label, layout in zip(s.labels, s.layouts)}
    assert all(limits[label] - MIXED < read[label] <= limits[label] for label in read)
    labels = s.rows(np.arange(end - 50, end))["labels"]
    assert (labels == s.source.labels.index("web")).all()
    with pytest.raises(RunError, match=r"data.max_epochs=3"):
        s.rows(np.arange(end, end + 1))


def test_fixed_counts_sum_up_and_leave_nobody_out():
    for weights in ([1, 1, 1], [0.7, 0.29, 0.01], [1e-9, 1, 1], np.arange(1, 201), [0, 3, 1]):
        counts = fixed_counts(np.array(weights, float))
        assert counts.sum() == MIXED and ((counts > 0) == (np.array(weights) > 0)).all()


def test_rows_and_read_of_a_mixture_agree():
    m = Mixture([5, 3, 1], [10, 0, 7], [3000, 900, 10**6])
    labels, positions = m.locate(np.arange(m.rows))
    for n in (0, 1, 500, 3000, int(m.rows)):
        expected = np.array([10, 0, 7]) + np.bincount(labels[:n], minlength=3)
        seen = m.read(n)
        assert (seen >= expected).all() and (seen - expected < MIXED).all()  # what a label leaves behind counts as read
    for label in range(3):
        mine = positions[labels == label]
        assert (np.diff(mine) == 1).all()


@pytest.mark.parametrize(("mixture", "message"), [
    ("web", "'web' must be a label and a weight"), ("web:x", "must be a label and a weight"), ("web:-1", "weight more than 0"),
    ("web:1,web:2", "each label once"), ("news:1", "no label 'news'; there are code, math, web")])
def test_a_wrong_mixture_is_refused(folder, mixture, message):
    with pytest.raises(InputError, match=message):
        stream(folder, mixture=mixture)


# ---- OLMo-core's files ----------------------------------------------------------------------------------------------


@pytest.fixture
def mix(tmp_path):
    """A mix of two files in OLMo-core's layout, its tokenizer, and their tokens."""
    tokenizer = tokenizer_file(tmp_path)
    tokens = {name: np.concatenate(documents(i, count, 300)) for i, (name, count) in enumerate({"a": 200, "b": 350}.items())}
    for name, array in tokens.items():
        (tmp_path / "org/tok" / name).mkdir(parents=True)
        array.astype("<u2").tofile(tmp_path / "org/tok" / name / "part-0.npy")
    (tmp_path / "m.txt").write_text("# a mix\nnews,{TOKENIZER}/a/part-0.npy\n\nbooks,{TOKENIZER}/b/part-0.npy\n")
    data = DataConfig(path=str(tmp_path / "m.txt"), format="olmo", tokenizer=str(tokenizer), sequence_length=1024,
                      mix_tokenizer="org/tok", max_documents_per_row=1024)
    return data, tokens


def test_a_mix_names_files_labels_and_documents(mix, tmp_path):
    data, tokens = mix
    source = open_olmo(data, None)
    assert source.labels == ["books", "news"] and len(source) == sum((t == EOS).sum() for t in tokens.values())
    np.testing.assert_array_equal(source.encoded(0, source.tokenizer), tokens["a"][:list(tokens["a"]).index(EOS) + 1])
    assert source.label(len(source) - 1) == "books"
    with pytest.raises(InputError, match="line 2: 'nothing' is not of the form label,path"):
        (tmp_path / "bad.txt").write_text("a,b\nnothing\n")
        read_mix(dataclasses.replace(data, path=str(tmp_path / "bad.txt")))


def test_the_published_order_is_that_of_a_loop_over_files_and_a_pcg64_shuffle_of_pairs(mix):
    data, tokens = mix
    data = dataclasses.replace(data, sequence_length=4096, order="olmo")
    c = Config(name="t", seed=11, data=data, model=ModelConfig(vocab_size=300))
    s = RowStream(c, open_olmo(data, None))
    instances = [t[i:i + 4096] for t in tokens.values() for i in range(0, len(t) // 8192 * 8192, 4096)]
    for number in (0, 1):
        pairs = np.arange(len(instances) // 2, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed=11 + 1 + number)).shuffle(pairs)
        expected = [instances[2 * p + i] for p in pairs for i in (0, 1)]
        got = s.rows(np.arange(number * len(instances), (number + 1) * len(instances)))
        np.testing.assert_array_equal(got["tokens"], np.stack(expected))


def test_a_real_npy_file_is_read_by_its_header_and_a_wrong_one_refused(mix, tmp_path):
    data, tokens = mix
    np.save(tmp_path / "real.npy", tokens["a"].astype(np.uint32))
    raw = open_olmo(dataclasses.replace(data, format="auto"), [list_files(str(tmp_path / "real.npy"))[1][0]])
    np.testing.assert_array_equal(raw.read([(0, 0, len(tokens["a"]))])[0], tokens["a"])
    np.save(tmp_path / "float.npy", np.ones(5))
    (tmp_path / "odd.npy").write_bytes(b"abc")
    for name, message in (("float", "float64 .*; expected one row of token ids"),
                          ("odd", "3 bytes are no array of tokens of 2")):
        with pytest.raises(InputError, match=message):
            open_olmo(data, list_files(str(tmp_path / f"{name}.npy"))[1])


def test_another_tokenizer_than_that_of_the_files_is_refused(folder, tmp_path):
    other = tokenizer_file(tmp_path, 301)
    with pytest.raises(InputError, match="was tokenized with another one"):
        open_shards(config(folder, tokenizer=str(other)).data)


# ---- scale ----------------------------------------------------------------------------------------------------------

_TRILLION = """
import sys, numpy as np
from emo_jax.config import Config, DataConfig
from emo_jax.data.stream import RowStream
from emo_jax.data.tokens import open_shards
c = Config(name="t", data=DataConfig(path=sys.argv[1], repetition_filter=False))
stream = RowStream(c, open_shards(c.data))
rows = stream.rows(np.arange(200_000_000, 200_000_000 + 64))
assert rows["tokens"].shape == (64, 4096) and stream.layouts[0].count == 10**12 // 4096 // 1000 * 1000
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_trillion_tokens_take_less_than_a_gigabyte_at_a_restart(tmp_path):
    from emo_jax.data.shards import Manifest, Section, Shard, pack_index, sha256

    tokens, length = 10**12 // 1000 // 4096 * 4096, 1 << 20
    ends = np.minimum(np.arange(1, -(-tokens // length) + 1) * length, tokens)
    pack_index(ends, np.arange(len(ends))).tofile(tmp_path / "index")
    with open(tmp_path / "tokens", "wb") as file:
        file.truncate(4 * tokens)
    shard = Shard("tokens", "index", tokens, len(ends), "", "", (Section("a", False, len(ends), tokens),), {})
    tokenizer = tokenizer_file(tmp_path)
    (tmp_path / "manifest.json").write_text(
        Manifest("uint32", EOS, 300, sha256(tokenizer.read_bytes()), "", {}, (shard,) * 1000).dumps())
    done = subprocess.run([sys.executable, "-c", _TRILLION, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
