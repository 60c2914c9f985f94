"""What a page says of an analysis in sentences, with the numbers in them.

Measures are looked up by their keys in analysis.json; a sentence whose measure is not there is left out. A difference is called
clear where its 95 % interval does not contain 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Found = dict[str, Any]


class Verdicts(NamedTuple):
    """Titles of the measures in which one direction is better."""

    better: list[str]
    worse: list[str]
    unclear: list[str]  # the interval contains 0, or there is none

    def total(self) -> int:
        return sum(map(len, self))


# ---- numbers --------------------------------------------------------------------------------------------------------


def number(value: float | None, signed: bool = False) -> str:
    """Three digits; a minus sign that is one."""
    if value is None:
        return "not known"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    shown = f"{abs(value):,.{digits}f}"
    return ("" if not float(shown.replace(",", "")) else "\u2212" if value < 0 else "+" if signed else "") + shown


def percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 or share == 0 else 1}f}\u00a0%"


def with_interval(m: dict[str, Any], unit: str = "", signed: bool = False) -> str:
    unit = f" {unit}" if unit else ""
    interval = "" if m["low"] is None else f" (95\u00a0%: {number(m['low'], signed)} to {number(m['high'], signed)})"
    return number(m["value"], signed) + unit + interval


def listing(parts: Iterable[str]) -> str:
    """a, b and c"""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


# ---- measures -------------------------------------------------------------------------------------------------------


def value(one: dict[str, Any] | None, key: str) -> float | None:
    """A measure of a model, if it is known."""
    return one["measures"].get(key, {}).get("value") if one else None


def beside_random(found: Found, key: str, form: Callable[[float], str] = number) -> str:
    """What a measure is without any modules, where that is known."""
    null = value(found["random_router"], key)
    return "" if null is None else f", against {form(null)} with routers drawn at random"


def verdicts(found: Found) -> Verdicts:
    made = Verdicts([], [], [])
    for row in found["measures"]:
        d = (found["difference"] or {}).get(row["key"])
        if d and row["better"]:
            {"better": made.better, "worse": made.worse, "": made.unclear}[verdict(d, row["better"])].append(row["title"])
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
    parts = {
        "What EMO modules are": "A mixture-of-experts model sends each token through a few small networks, its experts, that a "
                                "router picks. EMO trains every document to make do with a small pool of experts. Experts that "
                                "are used together become modules: parts of the model that can be taken along, audited or "
                                "switched off alone. In a standard MoE most texts use most experts.",
        "What was looked at": _looked_at(found),
        "What was found": _findings(found),
        "Against the baseline": _comparison(found) if found["difference"] else "",
    }
    return [{"title": title, "text": text} for title, text in parts.items() if text]


def _looked_at(found: Found) -> str:
    data, first = found["data"], found["models"][0]
    labels = f" in {len(data['labels'])} labels" if any(data["labels"]) else ""
    models = "; ".join(
        f"{one['name']} is {'an EMO model' if one['kind'] == 'emo' else 'a standard MoE'} of {number(one['parameters'] / 1e6)} "
        f"M parameters ({number(one['active_parameters'] / 1e6)} M used by a token), step {one['step']:,}"
        for one in found["models"])
    return (f"{data['tokens']:,} tokens of {data['documents']:,} documents{labels} (the first {data['tokens_per_document']} "
            f"tokens of each), from {data['source']}. For every token and each of {first['layers']} layers it is known which "
            f"of {first['experts']} experts the router preferred. {models}.")


def _findings(found: Found) -> str:
    parts, one = [], found["models"][0]
    if value(one, "effective_experts") is not None:
        parts.append(f"A document uses {with_interval(one['measures']['effective_experts'])} of {one['experts']} experts of a "
                     f"layer in effect{beside_random(found, 'effective_experts')}.")
    if (top := value(one, "top_quarter")) is not None:
        parts.append(f"The quarter that it prefers gets {percent(top)} of the router's probability; without preference it "
                     "would be 25\u00a0%.")
    if (told := value(one, "label_information")) is not None:
        parts.append(f"An expert tells {number(told)} nats of the label of the text"
                     f"{beside_random(found, 'label_information')}.")
    if one["clusters"]:
        main = [next(iter(c["labels"].values()), 0) for c in one["clusters"]]
        parts.append(f"Tokens fall into {len(one['clusters'])} clusters by the experts they use; {sum(x >= 0.5 for x in main)} "
                     "of them have most of their tokens from one label.")
    return " ".join(parts)


def _comparison(found: Found) -> str:
    first, second = (one["name"] for one in found["models"])
    v, d = verdicts(found), found["difference"]
    text = (f"Of {v.total()} measures in which one direction means clearer modules or a better model, {first} is clearly "
            f"better than {second} in {len(v.better)} and clearly worse in {len(v.worse)}; in {len(v.unclear)} the difference "
            "is within its error or has no interval.")
    if v.worse:
        text += f" Clearly worse: {'; '.join(v.worse)}."
    for key, what in (("gap_eighth", "an eighth"), ("gap_quarter", "a quarter")):
        a, b = (value(one, key) for one in found["models"])
        if key in d and a is not None and b is not None:
            text += (f" When each document may use only {what} of the experts, the loss changes by {number(a, True)} "
                     f"nats/token in {first} and {number(b, True)} in {second}: a difference of "
                     f"{with_interval(d[key], signed=True)}.")
            break
    return text + " The intervals resample documents, not trainings: they tell how sure the figures are of these checkpoints."
