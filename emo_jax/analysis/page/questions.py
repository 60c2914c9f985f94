"""Readers' questions, each with its answer in a sentence and the view of the page that shows it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from emo_jax.analysis.page.contents import Contents
from emo_jax.analysis.page.figures import cluster_name, expert_use, label_name
from emo_jax.analysis.page.words import (
    Found,
    beside_random,
    listing,
    number,
    percent,
    value,
    verdicts,
    with_interval,
)


class Question(NamedTuple):
    question: str
    answer: str
    link: str  # the hash of a view
    view: str  # its name


def questions(contents: Contents) -> list[Question]:
    """Those that these data answer."""
    found = contents.found
    labelled = len(found["data"]["labels"]) > 1
    made = [_beats_baseline(found), _serving(found) if labelled else None, _same_experts(found) if labelled else None,
            _removal(found), _few_experts(found), _topics_or_words(found), _layers(found), _cache(found), _kept(found),
            _near(contents) if labelled else None, _largest(found), _aligned(found)]
    return [question for question in made if question]


def _beats_baseline(found: Found) -> Question | None:
    first = found["models"][0]
    if found["difference"]:
        v, second = verdicts(found), found["models"][1]
        lead = "Yes, mostly" if len(v.better) > v.total() / 2 else "No" if len(v.worse) >= len(v.better) else "In part"
        return Question(
            f"Does {first['name']} beat {second['name']} here, and how sure is that?",
            f"{lead}: clearly better in {len(v.better)} of {v.total()} measures, clearly worse in {len(v.worse)}. Clear means "
            "that the 95\u00a0% interval of the difference, over documents, does not contain 0.", "measures", "Measures")
    if value(first, "label_information") is None or value(found["random_router"], "label_information") is None:
        return None
    m, null = (one["measures"]["label_information"] for one in (first, found["random_router"]))
    apart = None not in (m["low"], null["high"]) and m["low"] > null["high"]
    return Question("Do experts tell more of a label than with a random router?",
                    f"{'Yes' if apart else 'Not clearly'}: {with_interval(m, 'nats')}, with routers drawn at random "
                    f"{with_interval(null)}.", "measures", "Measures")


def _serving(found: Found) -> Question:
    """Of the label that has an expert most to itself."""
    one = found["models"][0]
    use = expert_use(one)
    lift = use / np.maximum(use.mean(axis=0), 1e-9) * (use > 1 / one["experts"])
    g, layer, _ = np.unravel_index(np.argmax(lift), lift.shape)
    top = [e for e in np.argsort(-use[g, layer], kind="stable")[:3] if use[g, layer, e] > 0]
    label, shares = found["data"]["labels"][g], listing(f"expert {e} ({percent(use[g, layer, e])})" for e in top)
    return Question(f"Which experts serve {label_name(label)}?",
                    f"In layer {layer} of {one['name']} most of its choices are {shares}. Choose any label to see its experts "
                    "in every layer.", f"labels={quote(label, safe='')}", "Labels")


def _same_experts(found: Found) -> Question | None:
    one, names = found["models"][0], [label_name(label) for label in found["data"]["labels"]]
    mean = np.mean(np.array(one["similarity"]["cosine"], float), axis=0)  # [G, G]
    pairs = [(mean[i, j], i, j) for i in range(len(mean)) for j in range(i) if math.isfinite(mean[i, j])]
    if not pairs:
        return None
    (most, a, b), (least, c, d) = max(pairs), min(pairs)
    return Question("Are two labels served by the same experts?",
                    f"Most alike in {one['name']} are {names[a]} and {names[b]} (cosine similarity {number(most)}, mean of "
                    f"layers); least alike {names[c]} and {names[d]} ({number(least)}).", "labels", "Labels")


def _removal(found: Found) -> Question | None:
    costs = [(rise, c, label) for c in found["models"][0]["clusters"] if c["removal"]
             for label, rise in c["removal"]["loss"].items() if label != "all" and rise is not None]
    if not costs:
        return None
    rise, c, label = max(costs, key=lambda cost: cost[0])
    return Question("What breaks if I drop a cluster?",
                    f"The costliest is {cluster_name(c)}. Without its experts the loss of {label_name(label)} changes by "
                    f"{number(rise, True)} nats/token, that of all text by {number(c['removal']['loss'].get('all'), True)}.",
                    f"cluster=a:{c['id']}", "Clusters")


def _few_experts(found: Found) -> Question | None:
    told = [f"{with_interval(one['measures']['effective_experts'])} of {one['experts']} in {one['name']}"
            for one in found["models"] if value(one, "effective_experts") is not None]
    return Question("How few experts does a document use?",
                    f"In effect {listing(told)}, in each layer{beside_random(found, 'effective_experts')}.", "layers",
                    "Layers") if told else None


def _topics_or_words(found: Found) -> Question | None:
    counts = np.array(found["data"]["documents_of_label"], float)
    shares = counts[counts > 0] / counts.sum()
    entropy, of = float(-np.sum(shares * np.log(shares))), []
    for one in found["models"]:
        label, token = value(one, "cluster_label"), value(one, "cluster_token")
        if label is not None and token is not None:
            of.append((one["name"], label, token))
    if not of or entropy <= 0:
        return None
    share = max(of[0][1] / entropy, 0)
    lead = "Topics to a large part" if share >= 0.5 else "Words more than topics" if share < 0.2 else "Both"
    null = value(found["random_router"], "cluster_label")
    if null is not None and of[0][1] <= null:
        lead = "Not shown, as routers drawn at random do as well"
    others = "".join(f"; in {name} {number(label)} and {number(token)} nats" for name, label, token in of[1:])
    return Question("Do modules follow topics or words?",
                    f"{lead}: a cluster tells {percent(share)} of what there is to know of a text's label ({number(of[0][1])} "
                    f"of {number(entropy)} nats{beside_random(found, 'cluster_label')}), and {number(of[0][2])} nats of the "
                    f"token itself{others}.", "measures", "Measures")


def _layers(found: Found) -> Question | None:
    one = found["models"][0]
    values = one["by_layer"].get("label_information", {"value": []})["value"]
    told = [(x, layer) for layer, x in enumerate(values) if x is not None]
    if len(told) < 2:
        return None
    (most, top), (least, low) = max(told), min(told)
    return Question("Which layers are modular?",
                    f"In {one['name']} experts of layer {top} tell most of the label ({number(most)} nats), those of layer "
                    f"{low} least ({number(least)}).", "layers", "Layers")


def _cache(found: Found) -> Question | None:
    title = next((row["title"] for row in found["measures"] if row["key"] == "segment_cache"), "")
    hits = [(one["name"], value(one, "segment_cache")) for one in found["models"]]
    told = [f"{percent(share)} of the choices in {name}" for name, share in hits if share is not None]
    return Question("Would an expert cache work?",
                    f"A cache of a segment's most frequent experts would answer {listing(told)}"
                    f"{beside_random(found, 'segment_cache', percent)}; the measure is {title}.", "measures",
                    "Measures") if told else None


def _kept(found: Found) -> Question | None:
    curves = [(one["name"], min(one["keep_curve"]["rows"], key=lambda row: row["share"])) for one in found["models"]
              if one["keep_curve"] and one["keep_curve"]["rows"]]
    told = [f"{number(row['difference'], True)} nats/token with {100 * row['share']:g}\u00a0% of the experts of {name}"
            for name, row in curves]
    return Question("What does a model lose with few experts?", f"The loss changes by {listing(told)}.", "keep",
                    "Few experts") if told else None


def _near(contents: Contents) -> Question | None:
    from scipy.spatial import KDTree

    label, places, name = contents.arrays["label"], contents.arrays["map_0"], contents.found["models"][0]["name"]
    if len(label) < 3:
        return None
    near = KDTree(places).query(places, k=2)[1]
    other = np.where(near[:, 0] == np.arange(len(label)), near[:, 1], near[:, 0])
    alike, chance = np.mean(label[other] == label), np.sum((np.bincount(label) / len(label)) ** 2)
    return Question("Which documents are near this one?",
                    f"Every document lists those nearest on the map of {name}; for {percent(alike)} of them the nearest has "
                    f"the same label (by chance {percent(chance)}).", "documents", "Documents")


def _largest(found: Found) -> Question | None:
    clusters: list[dict[str, Any]] = found["models"][0]["clusters"]
    if not clusters:
        return None
    c = max(clusters, key=lambda c: c["tokens"])
    label, share = next(iter(c["labels"].items()), ("", 0.0))
    words = ", ".join(w["text"].strip() or "␣" for w in c["words"][:5])
    return Question(f"What is cluster {c['id']}?",
                    f"The largest: {c['tokens']:,} tokens in {c['documents']:,} documents, {percent(share)} of them from "
                    f"{label_name(label)}; typical words: {words}.", f"cluster=a:{c['id']}", "Clusters")


def _aligned(found: Found) -> Question | None:
    pairs = found["alignment"]
    if not pairs:
        return None
    best, mean = max(pairs, key=lambda pair: pair["tokens"]), float(np.mean([pair["tokens"] for pair in pairs]))
    names = [next(cluster_name(c) for c in one["clusters"] if c["id"] == best[side])
             for one, side in zip(found["models"], ("a", "b"))]
    return Question("Do both models have the same clusters?",
                    f"Paired one to one, their clusters share {percent(mean)} of their tokens on average; most alike are "
                    f"“{names[0]}” and “{names[1]}” ({percent(best['tokens'])}).", f"cluster=a:{best['a']}", "Clusters")
