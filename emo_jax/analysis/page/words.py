"""What a page says of an analysis in sentences, with the numbers in them: its overview, and readers' questions.

Measures are looked up by their keys in analysis.json; a sentence whose measure is not there is left out. A difference is called
clear where its 95 % interval does not contain 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from emo_jax.analysis.page.contents import Contents
from emo_jax.analysis.page.figures import cluster_name, label_name

Found = dict[str, Any]


class Verdicts(NamedTuple):
    """Titles of the measures in which modules are better in one direction."""

    better: list[str]
    worse: list[str]
    unclear: list[str]  # the interval contains 0, or there is none


def number(value: float | None, signed: bool = False) -> str:
    """Three digits; a minus sign that is one."""
    if value is None:
        return "not known"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    shown = f"{abs(value):,.{digits}f}"
    return ("" if not float(shown.replace(",", "")) else "−" if value < 0 else "+" if signed else "") + shown


def percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 or share == 0 else 1}f}\u00a0%"


def with_interval(m: dict[str, Any], unit: str = "", signed: bool = False) -> str:
    unit = f" {unit}" if unit else ""
    interval = "" if m["low"] is None else f" (95\u00a0%: {number(m['low'], signed)} to {number(m['high'], signed)})"
    return number(m["value"], signed) + unit + interval


def verdicts(found: Found) -> Verdicts:
    made = Verdicts([], [], [])
    for row in found["measures"]:
        d = (found["difference"] or {}).get(row["key"])
        if d and row["better"]:
            made[{"better": 0, "worse": 1, "": 2}[verdict(d, row["better"])]].append(row["title"])
    return made


def verdict(difference: dict[str, Any], better: str) -> str:
    """ "better", "worse", or "" where the interval contains 0 or neither direction is better."""
    low, high = difference["low"], difference["high"]
    if not better or low is None or high is None or low <= 0 <= high:
        return ""
    return "better" if (low > 0) == (better == "higher") else "worse"


# ---- the overview ---------------------------------------------------------------------------------------------------


def overview(found: Found) -> list[dict[str, str]]:
    """[{"title", "text"}]"""
    data, one = found["data"], found["models"][0]
    labels = f" in {len(data['labels'])} labels" if any(data["labels"]) else ""
    looked = (f"{data['tokens']:,} tokens of {data['documents']:,} documents{labels} (the first {data['tokens_per_document']} tokens of "
              f"each), from {data['source']}. For every token and each of {one['layers']} layers it is known which of {one['experts']} "
              f"experts the router preferred. ")
    looked += "; ".join(f"{m['name']} is {_kind(m)} of {m['parameters'] / 1e6:,.1f} M parameters ({m['active_parameters'] / 1e6:,.1f} M "
                        f"used by a token), step {m['step']:,}" for m in found["models"]) + "."
    parts = [{"title": "What EMO modules are", "text": (
        "A mixture-of-experts model sends each token through a few small networks, its experts, that a router picks. EMO trains every "
        "document to make do with a small pool of experts. Experts that are used together become modules: parts of the model that can "
        "be taken along, audited or switched off alone. In a standard MoE most texts use most experts.")},
        {"title": "What was looked at", "text": looked}, {"title": "What was found", "text": _findings(found, one)}]
    if found["difference"]:
        parts.append({"title": "Against the baseline", "text": _comparison(found)})
    return [part for part in parts if part["text"]]


def _kind(one: dict[str, Any]) -> str:
    return "an EMO model" if one["kind"] == "emo" else "a standard MoE"


def _findings(found: Found, one: dict[str, Any]) -> str:
    parts, m = [], one["measures"]
    if known("effective_experts", one):
        parts.append(f"A document uses {with_interval(m['effective_experts'])} of {one['experts']} experts of a layer in effect"
                     f"{_beside_null(found, 'effective_experts')}.")
    if known("top_quarter", one):
        parts.append(f"The quarter that it prefers gets {percent(m['top_quarter']['value'])} of the router's probability; without "
                     "preference it would be 25 %.")
    if known("label_information", one):
        parts.append(f"An expert tells {number(m['label_information']['value'])} nats of the label of the text"
                     f"{_beside_null(found, 'label_information')}.")
    if one["clusters"]:
        main = [next(iter(c["labels"].values()), 0) for c in one["clusters"]]
        parts.append(f"Tokens fall into {len(one['clusters'])} clusters by the experts they use; {sum(x >= 0.5 for x in main)} of them "
                     "have most of their tokens from one label.")
    return " ".join(parts)


def _beside_null(found: Found, key: str) -> str:
    """What the measure is without any modules, where it is known."""
    null = found["random_router"]
    return f", against {number(null['measures'][key]['value'])} with routers drawn at random" if null and known(key, null) else ""


def _comparison(found: Found) -> str:
    first, second = (one["name"] for one in found["models"])
    v, d = verdicts(found), found["difference"]
    total = len(v.better) + len(v.worse) + len(v.unclear)
    text = (f"Of {total} measures in which one direction means clearer modules or a better model, {first} is clearly better than {second} "
            f"in {len(v.better)} and clearly worse in {len(v.worse)}; in {len(v.unclear)} the difference is within its error or has "
            "no interval.")
    if v.worse:
        text += f" Clearly worse: {'; '.join(v.worse)}."
    for key, what in (("gap_eighth", "an eighth"), ("gap_quarter", "a quarter")):
        if key in d and all(known(key, one) for one in found["models"]):
            a, b = (one["measures"][key]["value"] for one in found["models"])
            text += (f" When each document may use only {what} of the experts, the loss rises by {number(a)} in {first} and {number(b)} in "
                     f"{second}: a difference of {with_interval(d[key], 'nats/token', signed=True)}.")
            break
    return text + " The intervals resample documents, not trainings: they tell how sure the figures are of these checkpoints."


# ---- questions ------------------------------------------------------------------------------------------------------


def questions(contents: Contents) -> list[dict[str, str]]:
    """[{"question", "answer", "link": the hash of the view that shows it, "view": its name}], those that these data answer."""
    found = contents.found
    one, made = found["models"][0], [_beats_baseline(found)]
    if len(found["data"]["labels"]) > 1:
        made += [_serving(found, one), _same_experts(found, one)]
    made += [_removal(one), _few_experts(found), _topics_or_words(found, one), _layers(one), _cache(found), _kept(found),
             _near(contents), _largest(one), _aligned(found)]
    return [dict(zip(("question", "answer", "link", "view"), row)) for row in made if row]


Answer = tuple[str, str, str, str] | None


def known(key: str, *models: dict[str, Any]) -> bool:
    return all(one["measures"].get(key, {}).get("value") is not None for one in models)


def _beats_baseline(found: Found) -> Answer:
    if found["difference"]:
        v, (first, second) = verdicts(found), (one["name"] for one in found["models"])
        total = len(v.better) + len(v.worse) + len(v.unclear)
        lead = "Yes, mostly" if len(v.better) > total / 2 else "No" if len(v.worse) >= len(v.better) else "In part"
        return (f"Does {first} beat {second} here, and how sure is that?", f"{lead}: clearly better in {len(v.better)} of {total} measures, "
                f"clearly worse in {len(v.worse)}. Clear means that the 95 % interval of the difference, over documents, does not "
                "contain 0.", "measures", "Measures")
    if found["random_router"] and known("label_information", found["models"][0], found["random_router"]):
        m, null = (one["measures"]["label_information"] for one in (found["models"][0], found["random_router"]))
        apart = None not in (m["low"], null["high"]) and m["low"] > null["high"]
        return ("Is there more than a random router would show?", f"{'Yes' if apart else 'Not clearly'}: experts tell {with_interval(m)} "
                f"nats of the label, with routers drawn at random {with_interval(null)}.", "measures", "Measures")
    return None


def _serving(found: Found, one: dict[str, Any]) -> Answer:
    """Of the label that has an expert most to itself."""
    use = np.array(one["coverage"]["use"], float)  # [G, L, R]
    lift = use / np.maximum(use.mean(axis=0), 1e-9) * (use > 1 / one["experts"])
    g, layer, _ = np.unravel_index(np.nanargmax(lift), lift.shape)
    top = [e for e in np.argsort(-use[g, layer], kind="stable")[:3] if use[g, layer, e] > 0]
    label = found["data"]["labels"][g]
    return (f"Which experts serve {label_name(label)}?", f"In layer {layer} of {one['name']} most of all {_and(f'expert {e} ({percent(use[g, layer, e])} of its choices)' for e in top)}. "
            "Choose any label to see its experts in every layer.", f"labels={quote(label, safe='')}", "Labels")


def _same_experts(found: Found, one: dict[str, Any]) -> Answer:
    mean = np.mean(np.array(one["similarity"]["cosine"], float), axis=0)  # [G, G]
    pairs = [(mean[i, j], i, j) for i in range(len(mean)) for j in range(i) if math.isfinite(mean[i, j])]
    if not pairs:
        return None
    names = [label_name(label) for label in found["data"]["labels"]]
    (most, a, b), (least, c, d) = max(pairs), min(pairs)
    return ("Are two labels served by the same experts?", f"Most alike in {one['name']} are {names[a]} and {names[b]} (cosine similarity "
            f"{number(most)}, mean of layers); least alike {names[c]} and {names[d]} ({number(least)}).", "labels", "Labels")


def _removal(one: dict[str, Any]) -> Answer:
    costs = [(rise, c, label) for c in one["clusters"] if c["removal"] for label, rise in c["removal"]["loss"].items()
             if label != "all" and rise is not None]
    if not costs:
        return None
    rise, c, label = max(costs, key=lambda cost: cost[0])
    return ("What breaks if I drop a cluster?", f"The costliest is {cluster_name(c)}: without its experts the loss of {label_name(label)} "
            f"changes by {number(rise, True)} nats/token, that of all text by {number(c['removal']['loss'].get('all'), True)}.",
            f"cluster=a:{c['id']}", "Clusters")


def _few_experts(found: Found) -> Answer:
    models = [one for one in found["models"] if known("effective_experts", one)]
    if not models:
        return None
    told = _and(f"{with_interval(one['measures']['effective_experts'])} of {one['experts']} in {one['name']}" for one in models)
    return ("How few experts does a document use?", f"In effect {told}, in each layer{_beside_null(found, 'effective_experts')}.", "layers",
            "Layers")


def _topics_or_words(found: Found, one: dict[str, Any]) -> Answer:
    counts = np.array(found["data"]["documents_of_label"], float)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-np.sum(shares * np.log(shares)))
    if not known("cluster_label", one) or not known("cluster_token", one) or entropy <= 0:
        return None
    share = one["measures"]["cluster_label"]["value"] / entropy
    lead = "Topics to a large part" if share >= 0.5 else "Words more than topics" if share < 0.2 else "Both"
    return ("Do modules follow topics or words?", f"{lead}: a cluster tells {percent(max(share, 0))} of what there is to know of a text's "
            f"label ({number(one['measures']['cluster_label']['value'])} of {number(entropy)} nats{_beside_null(found, 'cluster_label')}), and "
            f"{number(one['measures']['cluster_token']['value'])} nats of the token itself"
            + "".join(f"; in {m['name']} {number(m['measures']['cluster_label']['value'])} and "
                      f"{number(m['measures']['cluster_token']['value'])} nats"
                      for m in found["models"][1:] if known("cluster_label", m) and known("cluster_token", m)) + ".", "measures", "Measures")


def _layers(one: dict[str, Any]) -> Answer:
    values = [x for x in one["by_layer"].get("label_information", {"value": []})["value"] if x is not None]
    if len(values) < 2:
        return None
    most, least = (one["by_layer"]["label_information"]["value"].index(f(values)) for f in (max, min))
    return ("Which layers are modular?", f"In {one['name']} experts of layer {most} tell most of the label ({number(max(values))} nats), those "
            f"of layer {least} least ({number(min(values))}).", "layers", "Layers")


def _cache(found: Found) -> Answer:
    title = next((row["title"] for row in found["measures"] if row["key"] == "segment_cache"), "")
    models = [one for one in found["models"] if known("segment_cache", one)]
    if not models:
        return None
    told = _and(f"{percent(one['measures']['segment_cache']['value'])} of the choices in {one['name']}" for one in models)
    return ("Would an expert cache work?", f"A cache that holds a segment's most frequent experts would answer {told}"
            f"{_beside_null(found, 'segment_cache')}; the measure is {title}.", "measures", "Measures")


def _kept(found: Found) -> Answer:
    curves = [(one["name"], min(one["keep_curve"]["rows"], key=lambda row: row["share"])) for one in found["models"]
              if one["keep_curve"] and one["keep_curve"]["rows"]]
    if not curves:
        return None
    told = _and(f"{number(row['difference'], True)} nats/token with {percent(row['share'])} of the experts of {name}" for name, row in curves)
    return ("What does a model lose with few experts?", f"The loss changes by {told}.", "keep", "Few experts")


def _near(contents: Contents) -> Answer:
    from scipy.spatial import cKDTree

    found, label = contents.found, contents.arrays["label"]
    if len(label) < 3 or len(found["data"]["labels"]) < 2:
        return None
    places = contents.arrays["map_0"]
    near = cKDTree(places).query(places, k=2)[1]
    other = np.where(near[:, 0] == np.arange(len(label)), near[:, 1], near[:, 0])
    chance = np.sum((np.bincount(label) / len(label)) ** 2)
    return ("Which documents are near this one?", f"Every document lists those nearest on the map of {found['models'][0]['name']}; for "
            f"{percent(np.mean(label[other] == label))} of them the nearest has the same label (by chance {percent(chance)}).",
            "documents", "Documents")


def _largest(one: dict[str, Any]) -> Answer:
    if not one["clusters"]:
        return None
    c = max(one["clusters"], key=lambda c: c["tokens"])
    label, share = next(iter(c["labels"].items()), ("", 0.0))
    words = ", ".join(w["text"].strip() or "␣" for w in c["words"][:5])
    return (f"What is cluster {c['id']}?", f"The largest: {c['tokens']:,} tokens in {c['documents']:,} documents, {percent(share)} of them from "
            f"{label_name(label)}; typical words: {words}.", f"cluster=a:{c['id']}", "Clusters")


def _aligned(found: Found) -> Answer:
    pairs = found["alignment"]
    if not pairs:
        return None
    best, (first, second) = max(pairs, key=lambda pair: pair["tokens"]), found["models"]
    a, b = (next(c for c in one["clusters"] if c["id"] == best[side]) for one, side in ((first, "a"), (second, "b")))
    return ("Do both models have the same clusters?", f"Paired one to one, their clusters share {percent(np.mean([p['tokens'] for p in pairs]))} of "
            f"their tokens on average; most alike are {cluster_name(a)} and {cluster_name(b)} ({percent(best['tokens'])}).",
            f"cluster=a:{a['id']}", "Clusters")


def _and(parts: Any) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
