"""A folder as `emo-jax analyze` leaves it, made up: for tests of its page."""

import json
from pathlib import Path

import numpy as np

# A text and a label that must never be taken for markup.
STRANGE = '<script>window.ran = "text"</script><img src=x onerror="window.ran=1">'
STRANGE_LABEL = '</script><script>window.ran = "label"</script>'
TOPICS = {  # nouns, verbs
    "law": ("court appeal judge statute contract plaintiff damages jury evidence clause",
            "held dismissed reversed granted ruled"),
    "medicine": ("patient dose therapy tumour artery insulin trial symptom fever nurse",
                 "treated diagnosed reduced relieved tested"),
    "cooking": ("butter onion oven garlic dough sauce pepper lemon skillet flour",
                "simmers melts browns thickens rises"),
    "astronomy": ("galaxy orbit comet telescope nebula spectrum planet dust redshift halo",
                  "orbits emits collapses shines drifts"),
    "code": ("array pointer loop function buffer thread parser index stack lock",
             "returns allocates parses iterates locks"),
    "football": ("goal striker keeper penalty midfield corner referee league header cup",
                 "scored tackled saved passed missed"),
    "finance": ("bond yield margin equity dividend hedge ledger credit default broker",
                "rallied fell hedged lent priced"),
    "sea": ("harbour mast tide anchor gull sail storm keel reef captain",
            "sailed anchored drifted moored rolled"),
}
COMMON = "the of a and to in was that".split()
PATTERNS = ("the N V a N of the N . ", "in the N a N V and V . ", "a N that V the N was N , and the N V . ",
            "the N of a N V to the N ; ")
MEASURES = (  # key, title, unit, better, a plausible EMO, standard MoE and random router, baseline
    ("loss", "Loss with all experts", "nats/token", "lower", 3.41, 3.38, 9.2, None),
    ("gap_quarter", "Selective gap at 25 %", "nats/token", "lower", 0.012, 0.31, 0.002, 0.0),
    ("gap_eighth", "Selective gap at 12.5 %", "nats/token", "lower", 0.06, 1.02, 0.01, 0.0),
    ("label_information", "What experts tell of the label", "nats", "higher", 0.62, 0.11, 0.01, 0.0),
    ("cluster_label", "What clusters tell of the label", "nats", "higher", 0.94, 0.22, 0.08, 0.0),
    ("token_information", "What experts tell of the token itself", "nats", "", 0.48, 1.21, 0.33, 0.0),
    ("cluster_token", "What clusters tell of the token itself", "nats", "lower", 0.71, 1.66, 0.4, 0.0),
    ("effective_experts", "Effective experts a document", "experts", "lower", 4.8, 10.9, 13.8, None),
    ("top_quarter", "Routing mass in a document's top 25 %", "share", "higher", 0.81, 0.44, 0.27, 0.25),
    ("top_eighth", "Routing mass in a document's top 12.5 %", "share", "higher", 0.55, 0.26, 0.14, 0.125),
    ("pool_overlap", "Pools alike within a label", "share", "higher", 0.41, 0.09, 0.004, 0.0),
    ("segment_cache", "Segment cache hits", "share", "higher", 0.93, 0.68, 0.55, None),
    ("silhouette", "Silhouette of the clusters", "-1 to 1", "higher", 0.34, 0.34, 0.05, None),
)
SINGLE = ("silhouette",)  # without an interval
LAYERED = ("label_information", "token_information", "effective_experts", "top_quarter", "segment_cache")


def write_example(folder: Path, documents: int = 60, layers: int = 3, experts: int = 15, models: int = 2, labels: int = 6,
                  clusters: int = 8, tokens: int = 60, shown: int | None = None, strange: tuple[str, ...] = (),
                  strange_label: str = "", keep_curves: bool = True, seed: int = 0) -> Path:
    """analysis.json and documents.npz in `folder`. tokens: of a document. shown: documents with text, by default all. strange:
    texts of the first documents, and strange_label the name of the last label, for what must not be taken for markup."""
    draw = np.random.default_rng(seed)
    topics = list(TOPICS)
    names = [topics[g % len(topics)] + ("" if g < len(topics) else f" {g // len(topics) + 1}") for g in range(labels)]
    names[-1] = strange_label or names[-1]
    of_document = np.sort(np.arange(documents) % labels)
    vocabulary, of_token, wide = _text(draw, of_document, labels, tokens)
    for d, text in enumerate(strange):
        vocabulary += [text, " is", " a", " text"]
        of_token[d, :4] = np.arange(4) + len(vocabulary) - 4
    kept = np.unique(np.linspace(0, documents - 1, shown or documents).round().astype(int))
    arrays = {
        "label": of_document.astype(np.uint8), "shown": kept.astype(np.int32),
        "tokens": of_token[kept].ravel().astype(np.int32),
        "title": np.array(["".join(vocabulary[t] for t in row[:16]).strip()[:80] for row in of_token]),
        "starts": np.arange(len(kept) + 1, dtype=np.int64) * tokens, "vocabulary": np.array(vocabulary),
    }
    described = []
    for i in range(models):
        topical = 0.94 if i == 0 else 0.35
        by_topic = np.where(wide % 3 == 0, clusters - 1 - wide // 3, of_document[:, None] % max(clusters - 2, 1))
        by_topic = np.where(draw.random(of_token.shape) < topical, by_topic, draw.integers(0, clusters, of_token.shape))
        strongest = (by_topic[kept].ravel()[:, None] * 5 + draw.integers(0, 3, (len(kept) * tokens, layers))) % experts
        arrays[f"clusters_{i}"] = by_topic[kept].ravel().astype(np.uint8)
        arrays[f"experts_{i}"] = strongest.astype(np.uint8)
        centres = np.array([[np.cos(a), np.sin(a)] for a in np.arange(labels) * 2 * np.pi / labels])
        arrays[f"map_{i}"] = (30 * topical * centres[of_document] + draw.normal(0, 6, (documents, 2))).astype(np.float32)
        made = _model(draw, i, by_topic, of_token, of_document, vocabulary, names, layers, experts, clusters)
        described.append(made if keep_curves else made | {"keep_curve": None})
    found = {
        "data": {"source": "corpus.jsonl", "documents": documents, "tokens": documents * tokens, "tokens_per_document": tokens,
                 "labels": names, "documents_of_label": np.bincount(of_document, minlength=labels).tolist()},
        "models": described, "random_router": {"name": "emo_tiny with random routers", "measures": _measures(2)},
        "difference": None, "alignment": None, "questions": [],
        "measures": [{"key": key, "title": title, "unit": unit, "better": better, "help": f"{title}, in one plain sentence."}
                     for key, title, unit, better, *_ in MEASURES],
    }
    if models == 2:
        found["difference"] = {key: _estimate(key, a - b, 0.06 * abs(a - b) + 0.02) for key, _, _, _, a, b, *_ in MEASURES}
        found["alignment"] = [{"a": c, "b": (c + 1) % clusters, "tokens": 0.1 + 0.5 * c / clusters} for c in range(clusters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(found))
    np.savez_compressed(folder / "documents.npz", **arrays)
    return folder


def _text(draw, of_document, labels, tokens) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(vocabulary, tokens of every document, kind of every token: 0 common, 1 noun, 2 verb, 3 mark)"""
    vocabulary = [" " + word for word in COMMON] + [".", ",", ";"]
    first, marks = {}, {".": 8, ",": 9, ";": 10}
    for g in range(labels):
        nouns, verbs = list(TOPICS.values())[g % len(TOPICS)]
        first[g] = len(vocabulary)
        vocabulary += [" " + word for word in (*nouns.split(), *verbs.split())]
    slots = np.array([word for pattern in PATTERNS for word in pattern.split()])
    at = (draw.integers(0, len(slots), len(of_document))[:, None] + np.arange(tokens)) % len(slots)
    kinds = np.array([1 if s == "N" else 2 if s == "V" else 3 if s in marks else 0 for s in slots])[at]
    fixed = np.array([0 if s in "NV" else marks[s] if s in marks else COMMON.index(s) for s in slots])[at]
    start = np.array([first[g] for g in of_document])[:, None]
    made = np.where(kinds == 1, start + draw.integers(0, 10, at.shape), fixed)
    return vocabulary, np.where(kinds == 2, start + 10 + draw.integers(0, 5, at.shape), made), kinds


def _estimate(key: str, value: float, half: float) -> dict[str, float | None]:
    single = key in SINGLE
    return {"value": value, "low": None if single else value - half, "high": None if single else value + half}


def _measures(column: int) -> dict[str, dict[str, float | None]]:
    return {row[0]: _estimate(row[0], row[4 + column], 0.04 * abs(row[4 + column]) + 0.002) | {"baseline": row[7]}
            for row in MEASURES}


def _model(draw, i, by_topic, of_token, of_document, vocabulary, names, layers, experts, clusters) -> dict:
    use = draw.dirichlet(np.full(experts, 0.2 if i == 0 else 2.0), (len(names), layers))  # [G, L, R]
    unit = use / np.linalg.norm(use, axis=2, keepdims=True)
    cosine = np.einsum("glr,hlr->lgh", unit, unit)
    depth = 0.5 + 0.5 * np.arange(layers) / max(layers - 1, 1)
    values = {row[0]: row[4 + i] * depth for row in MEASURES if row[0] in LAYERED}
    kept = [(share, max(1, round(share * experts)), (0.9, 3.1)[i] * (1 - share) ** 3) for share in (0.5, 0.25, 0.125)]
    own = (np.arange(clusters)[:, None] + np.arange(3)) % experts
    overlap = [[len(set(a) & set(b)) / 3 for b in own.tolist()] for a in own.tolist()]
    made = [_cluster(draw, c, by_topic, of_token, of_document, vocabulary, names, layers, experts, own[c], overlap[c])
            for c in range(clusters)]
    subset = {key: value for key, value in made[-1].items() if key not in ("id", "overlap")} | {"name": "law", "share": 0.25}
    return {
        "name": ("emo_tiny", "std_tiny")[i], "checkpoint": f"runs/{('emo', 'std')[i]}/checkpoints/300", "step": 300,
        "layers": layers, "experts": experts, "top_k": 3, "shared": 1, "kind": ("emo", "standard")[i], "parameters": 3_617_280,
        "active_parameters": 1_027_712, "measures": _measures(i),
        "by_layer": {key: {"value": v.tolist(), "low": (0.93 * v).tolist(), "high": (1.07 * v).tolist()}
                     for key, v in values.items()},
        "clusters": made, "subsets": [] if i else [subset],
        "coverage": {"use": use.tolist(), "effective": np.exp(-(use * np.log(use + 1e-12)).sum(axis=2)).tolist(),
                     "covered": (use > 1 / experts).mean(axis=2).tolist()},
        "similarity": {"cosine": cosine.tolist(), "distance": (1 - cosine).tolist(), "pool_overlap": (0.9 * cosine).tolist()},
        "keep_curve": {"rows": [{"share": share, "keep": keep, "difference": d, "low": 0.9 * d, "high": 1.1 * d}
                                for share, keep, d in kept]},
    }


def _cluster(draw, c, by_topic, of_token, of_document, vocabulary, names, layers, experts, own, overlap) -> dict:
    where = by_topic == c
    tokens, labels = of_token[where], np.repeat(of_document, by_topic.shape[1])[where.ravel()]
    share = np.bincount(labels, minlength=len(names)) / max(len(labels), 1)
    counts, total = (np.bincount(t, minlength=len(vocabulary)) for t in (tokens, of_token.ravel()))
    lift = counts / len(tokens) / np.maximum(total / of_token.size, 1e-9) if len(tokens) else counts * 0.0
    top = [t for t in np.argsort(-lift * np.sqrt(counts)) if lift[t] > 1][:20]
    places = np.argwhere(where)
    contexts = []
    for d, p in places[draw.permutation(len(places))[:12]].tolist():
        text = [vocabulary[t] for t in of_token[d]]
        contexts.append({"document": d, "position": p, "before": "".join(text[max(p - 9, 0):p]), "token": text[p],
                         "after": "".join(text[p + 1:p + 10])})
    removal = {names[g]: float(0.9 * s * draw.uniform(0.6, 1.2) - 0.003) for g, s in enumerate(share)}
    return {
        "id": c, "name": " · ".join(vocabulary[t].strip() for t in top[:3]), "tokens": int(where.sum()),
        "documents": int(where.any(axis=1).sum()),
        "labels": {names[g]: float(share[g]) for g in np.argsort(-share) if share[g]},
        "experts": [[[int(e), 0.3 / (n + 1), 4.5 / (n + 1)] for n, e in enumerate([*own, *((own[:2] + 5) % experts)])]
                    for _ in range(layers)],
        "words": [{"text": vocabulary[t], "count": int(counts[t]), "lift": float(lift[t])} for t in top], "contexts": contexts,
        "removal": {"experts": [own.tolist()] * layers, "loss": {"all": 0.05} | removal} if c else None, "overlap": overlap,
    }
