"""Token files of random documents for tests, written without the package's own writer."""

import json
from pathlib import Path

import numpy as np

from emo_jax.data.shards import Manifest, Section, Shard, pack_index, sha256

EOS = 0


def tokenizer_file(folder: Path, vocab_size: int = 300) -> Path:
    """A tokenizer.json of one token a word, w1 .. w{vocab_size - 1}; the end of a document is 0."""
    import tokenizers

    vocab = {"<|endoftext|>": EOS} | {f"w{i}": i for i in range(1, vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|endoftext|>"])
    path = folder / "tokenizer.json"
    path.write_text(made.to_str())
    return path


def documents(seed: int, count: int, longest: int = 120, vocab_size: int = 300) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, vocab_size, rng.integers(0, longest)), EOS) for _ in range(count)]


def write_shards(folder: Path, shards: list[dict[tuple[str, bool], list[np.ndarray]]], dtype: str = "uint16") -> Path:
    """A folder of shards, each {(label, held out): documents}."""
    folder.mkdir(parents=True, exist_ok=True)
    described, number = [], 0
    for i, sections in enumerate(shards):
        name = f"shard-{i:05d}-of-{len(shards):05d}"
        everything = [d for part in sections.values() for d in part]
        np.concatenate(everything).astype(dtype).tofile(folder / f"{name}.npy")
        ends = np.cumsum([len(d) for d in everything])
        pack_index(ends, number + np.arange(len(ends))).tofile(folder / f"{name}.index")
        number += len(ends)
        described.append(Shard(
            f"{name}.npy", f"{name}.index", int(ends[-1]), len(ends), sha256((folder / f"{name}.npy").read_bytes()),
            sha256((folder / f"{name}.index").read_bytes()),
            tuple(Section(label, held, len(part), sum(map(len, part))) for (label, held), part in sections.items()), {}))
    tokenizer = tokenizer_file(folder)
    manifest = Manifest(dtype, EOS, 300, sha256(tokenizer.read_bytes()), "test", {}, tuple(described))
    (folder / "manifest.json").write_text(manifest.dumps())
    json.loads((folder / "manifest.json").read_text())
    return folder
