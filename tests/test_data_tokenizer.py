"""Tokenizers: a given file, or a BPE trained on the documents."""

import json
import pickle

import numpy as np
import pytest
import tokenizers

from emo_jax.config import Config, DataConfig, ModelConfig
from emo_jax.data.documents import Document, Source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from emo_jax.errors import InputError

EOS = "<|endoftext|>"
TEXTS = ["the cat sat on the mat, the cat ran", "naïve café — ünïcödé 日本語 🙂\r\n\ttabs", "1234567 + 89 = x", "a"]


class Texts(Source):
    name, labels, fingerprint = "texts", ["t"], ""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return Document(TEXTS[i], "t", i)


def test_trained_bpe_round_trip_and_reuse(tmp_path):
    tokenizer = train_bpe(Texts(), range(4), 300, tmp_path, EOS)
    written = (tmp_path / "tokenizer.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert 257 < tokenizer.vocab_size <= 300
    again = train_bpe(Texts(), range(1), 300, tmp_path, EOS)  # is there: not trained again
    assert (tmp_path / "tokenizer.json").read_bytes() == written
    (tmp_path / "other").mkdir()
    train_bpe(Texts(), range(4), 300, tmp_path / "other", EOS)
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == written  # the same on every host
    for text in [*TEXTS, "never seen: \x00 Ω", ""]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        assert np.array_equal(again.encode(text), ids)
        assert np.array_equal(pickle.loads(pickle.dumps(tokenizer)).encode(text), ids)
        assert tokenizer.encode_document(text).tolist() == [*ids, tokenizer.eos_id]


def test_only_training_documents_are_seen(tmp_path):
    tokenizer = train_bpe(Texts(), [1, 2, 3], 400, tmp_path, EOS)
    assert "cat" not in tokenizer._tokenizer.get_vocab() and "the" not in tokenizer._tokenizer.get_vocab()


def test_a_special_token_in_a_text_is_plain_text(tmp_path):
    tokenizer = train_bpe(Texts(), range(4), 300, tmp_path, EOS)
    for t in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = t.encode(f"a{EOS}b")
        assert t.eos_id not in ids and t.decode(ids) == f"a{EOS}b"


def test_token_bytes_add_up_to_the_text(tmp_path):
    tokenizer = train_bpe(Texts(), range(4), 300, tmp_path, EOS)
    sizes = tokenizer.token_bytes(512)
    assert sizes.shape == (512,) and sizes.dtype == np.int32 and not sizes[tokenizer.vocab_size:].any()
    assert sizes[tokenizer.eos_id] == 0
    for text in TEXTS:
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_token_bytes_of_a_byte_fallback_tokenizer(tmp_path):
    vocab = {EOS: 0, "<unk>": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}, "▁": 258, "a": 259, "▁a": 260}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(prepend_scheme="never")])
    model.add_special_tokens([EOS])
    model.add_tokens([tokenizers.AddedToken("    ", normalized=False)])  # an added token that is text
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, EOS)
    for text in ("a a aa", "é a🙂", "a    a"):
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_what_is_wrong_is_named(tmp_path):
    def message(vocab_size=512, **fields):
        with pytest.raises(InputError) as e:
            config = Config(name="t", model=ModelConfig(vocab_size=vocab_size), data=DataConfig(**fields))
            load_tokenizer(config, Texts(), range(4), tmp_path / "new")
        return str(e.value)

    path = tmp_path / "tokenizer.json"
    assert "no such file" in message(tokenizer=str(path))
    path.write_text(json.dumps({"model": 3}))
    assert "not a tokenizer.json" in message(tokenizer=str(path))
    path.unlink()
    train_bpe(Texts(), range(4), 300, tmp_path, EOS)
    assert f"its special tokens are ['{EOS}']" in message(tokenizer=str(path), eos_token="</s>")
    assert "model.vocab_size=280 is less than" in message(tokenizer=str(path), vocab_size=280)
    assert "at least 257" in message(vocab_size=256)
