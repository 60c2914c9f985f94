"""What `emo-jax analyze` leaves in its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.analysis import clusters as clusters_lib
from emo_jax.analysis.looked import Looked
from emo_jax.analysis.report import write_cards
from emo_jax.analysis.text import Text
from emo_jax.analysis.words import Words
from emo_jax.files import replacing, write_json, write_text

TITLE = 80  # characters of a document
PAGE_BYTES = 8 << 20  # of the arrays of tokens, before compression: documents whose text is in the page
MAP_COMPONENTS = 50


def write(folder: Path, found: dict[str, Any], text: Text, words: Words, looked: Sequence[Looked]) -> None:
    write_json(folder / "analysis.json", found)
    with replacing(folder / "documents.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **_documents(text, words, looked))
    write_cards(folder, found)
    (folder / "tables").mkdir(exist_ok=True)
    for title, rows in tables(found).items():
        buffer = io.StringIO()
        csv.writer(buffer).writerows(rows)
        write_text(folder / "tables" / f"{title}.csv", buffer.getvalue())


def _documents(text: Text, words: Words, looked: Sequence[Looked]) -> dict[str, np.ndarray]:
    """See `page`: the documents, their places on each model's map, and the text of as many as a page holds."""
    starts = text.starts
    per_token = 2 + sum(1 + one.activations.layers * one.activations.expert_ids.itemsize for one in looked)
    lengths = np.diff(starts)
    rank = np.random.default_rng(0).permutation(len(lengths))  # drawn, so that each label has its part
    shown = np.sort(rank[np.cumsum(lengths[rank]) * per_token <= PAGE_BYTES])
    use = np.isin(text.documents, shown)
    used, tokens = np.unique(words.piece_of_token[use], return_inverse=True)
    made = {
        "label": text.labels.astype(np.uint16), "number": text.numbers,
        "title": np.array([" ".join(words.spelled(low, min(high, low + TITLE // 2)).split())[:TITLE]
                           for low, high in pairwise(starts.tolist())]),
        "shown": shown.astype(np.int32), "starts": np.concatenate([[0], np.cumsum(lengths[shown])]),
        "tokens": tokens.astype(np.int32), "vocabulary": np.array([words.pieces[i] for i in used]),
    }
    for i, one in enumerate(looked):
        made[f"map_{i}"] = _map(clusters_lib.document_features(one.activations))
        made[f"clusters_{i}"] = one.clusters.of_token[use].astype(np.uint8)
        made[f"experts_{i}"] = one.activations.expert_ids[use, :, 0]  # the strongest
    return made


def _map(x: np.ndarray) -> np.ndarray:
    """[D, 2] float32: documents that use the same experts lie together (t-SNE)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(x) < 4:
        return np.zeros((len(x), 2), np.float32)
    few = PCA(min(MAP_COMPONENTS, *x.shape), random_state=0).fit_transform(x.astype(np.float32))
    return TSNE(2, perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(few).astype(np.float32)


def tables(found: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """Rows of every CSV file, the first one the names of the columns."""
    made: dict[str, list[list[Any]]] = {"measures": [["model", "measure", "unit", "value", "low", "high", "baseline"]]}
    units = {row["key"]: row["unit"] for row in found["measures"]}
    for one in [*found["models"], *filter(None, [found["random_router"]])]:
        made["measures"] += [[one["name"], key, units[key], m["value"], m["low"], m["high"], m["baseline"]]
                             for key, m in one["measures"].items()]
    labels = found["data"]["labels"]
    made["layers"] = [["model", "measure", "layer", "value", "low", "high"]]
    made["coverage"] = [["model", "label", "layer", "effective_experts", "covered", "most_used_experts"]]
    made["similarity"] = [["model", "layer", "label", "other", "cosine", "distance", "pool_overlap"]]
    made["clusters"] = [["model", "cluster", "name", "tokens", "documents", "label", "share", "removal"]]
    for one in found["models"]:
        for key, m in one["by_layer"].items():
            low, high = (m[side] or [None] * len(m["value"]) for side in ("low", "high"))
            made["layers"] += [[one["name"], key, i, *values] for i, values in enumerate(zip(m["value"], low, high))]
        c, s = one["coverage"], one["similarity"]
        for g, label in enumerate(labels):
            for layer, use in enumerate(c["use"][g]):
                top = " ".join(map(str, np.argsort(-np.array(use), kind="stable")[:8]))
                made["coverage"].append([one["name"], label, layer, c["effective"][g][layer], c["covered"][g][layer], top])
            made["similarity"] += [
                [one["name"], layer, label, other, *(s[key][layer][g][h] for key in made["similarity"][0][4:])]
                for layer in range(one["layers"]) for h, other in enumerate(labels)]
        for cluster in one["clusters"]:
            label, share = next(iter(cluster["labels"].items()))
            removal = cluster["removal"] and cluster["removal"]["loss"]["all"]
            made["clusters"].append([one["name"], *(cluster[key] for key in ("id", "name", "tokens", "documents")), label,
                                     share, removal])
    return made
