"""An analysis folder of made-up numbers, as `emo-jax analyze` writes it: for tests of the page."""

import json
from pathlib import Path

import numpy as np

from emo_jax.analysis.measures import MEASURES

WORDS = "law court judge appeal protein cell gene def return import the of and in verse chorus".split()
LABELS = ["law", "biology", "code", "songs"]


def write_example(folder: Path, documents: int = 40, layers: int = 3, experts: int = 8, models: int = 2, length: int = 20,
                  clusters: int = 5, text: str = "") -> Path:
    """`text`: what document 0 is, instead of words."""
    draw = np.random.default_rng(0)
    label = np.arange(documents) % len(LABELS)
    pieces = [f" {word}" for word in WORDS] + [f" w{i}" for i in range(1000)]
    tokens = draw.integers(0, len(pieces) if documents > 1000 else len(WORDS), documents * length)
    if text:
        pieces.append(text)
        tokens[0] = len(pieces) - 1
    titles = ["".join(pieces[t] for t in tokens[d * length:][:6]).strip()[:80] for d in range(documents)]
    arrays = {"label": label.astype(np.uint16), "number": np.arange(documents), "title": np.array(titles),
              "shown": np.arange(documents, dtype=np.int32), "starts": np.arange(documents + 1) * length,
              "tokens": tokens.astype(np.int32), "vocabulary": np.array(pieces)}
    for i in range(models):
        arrays[f"map_{i}"] = draw.normal(label[:, None], 0.3, (documents, 2)).astype(np.float32)
        arrays[f"clusters_{i}"] = ((np.repeat(label, length) + draw.integers(0, 2, len(tokens))) % clusters).astype(np.uint8)
        arrays[f"experts_{i}"] = draw.integers(0, experts, (len(tokens), layers)).astype(np.uint8)
    described = [_model(i, draw, layers, experts, clusters, arrays, text) for i in range(models)]
    difference = {row.key: {"value": 0.4, "low": 0.2, "high": 0.6} for row in MEASURES}
    found = {
        "data": {"source": "example.jsonl", "documents": documents, "tokens": len(tokens), "tokens_per_document": length,
                 "labels": LABELS, "documents_of_label": np.bincount(label).tolist()},
        "models": described, "measures": [row._asdict() for row in MEASURES],
        "random_router": {"name": "a with random routers", "tokens": 100, "measures": described[0]["measures"]},
        "difference": difference if models == 2 else None,
        "alignment": [{"a": c, "b": c, "tokens": 0.5} for c in range(clusters)] if models == 2 else None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(found))
    np.savez_compressed(folder / "documents.npz", **arrays)
    return folder


def _model(i, draw, layers, experts, clusters, arrays, text):
    G, value = len(LABELS), lambda: {"value": 1.5 - i, "low": 1.2 - i, "high": 1.8 - i, "baseline": 0.0}
    use = draw.dirichlet(np.full(experts, 0.3), (G, layers))
    square = lambda: draw.random((layers, G, G)).tolist()
    whole = ("loss", "gap_quarter", "gap_eighth", "cluster_label", "cluster_token", "silhouette", "davies_bouldin",
             "source_entropy")
    by_layer = [row.key for row in MEASURES if row.key not in whole]
    return {
        "name": f"model_{'ab'[i]}", "checkpoint": "runs/x/checkpoints/1", "step": 1, "layers": layers, "experts": experts,
        "top_k": 2, "shared": 1, "identity": {"name": "x"}, "kind": ("emo", "standard")[i], "parameters": 10, "active_parameters": 5,
        "measures": {row.key: value() for row in MEASURES},
        "by_layer": {key: {"value": [0.5] * layers, "low": [0.4] * layers, "high": [0.6] * layers} for key in by_layer},
        "clusters": [{
            "id": c, "name": f"{WORDS[c]} · {WORDS[c + 5]}", "tokens": 100 - c, "documents": 20,
            "labels": {LABELS[c % G]: 0.8, LABELS[(c + 1) % G]: 0.2},
            "experts": [[[e, 0.2, 3.0] for e in range(3)] for _ in range(layers)],
            "words": [{"text": text or w, "count": 9, "lift": 4.0} for w in WORDS[c:c + 4]],
            "contexts": [{"document": d, "position": 1, "before": text or "so the ", "token": "court", "after": " ruled"}
                         for d in range(3)],
            "removal": {"experts": [[0, 1]] * layers,
                        "loss": {"all": 0.01, **{name: 0.02 * g for g, name in enumerate(LABELS)}}},
            "overlap": [0.5] * clusters} for c in range(clusters)],
        "subsets": [], "coverage": {"use": use.tolist(), "effective": (4 + draw.random((G, layers))).tolist(),
                                    "covered": draw.random((G, layers)).tolist()},
        "similarity": {"cosine": square(), "distance": square(), "pool_overlap": square()},
        "keep_curve": {"subsets": [{"share": s, "keep": 2, "difference": 0.1 / s, "interval": [0.09 / s, 0.11 / s]}
                                   for s in (0.5, 0.25)]}}
