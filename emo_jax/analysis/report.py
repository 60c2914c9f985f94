"""An analysis for people who read text: the table of measures, and a card for each module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emo_jax.analysis.modules import experts_of
from emo_jax.files import write_text


def text_table(found: dict[str, Any]) -> str:
    """Every measure, the models side by side, with 95 % intervals over documents."""
    columns = [*found["models"], *filter(None, [found["random_router"]])]
    names = [one["name"] for one in columns] + (["difference"] if found["difference"] else [])
    width = max(24, *map(len, names)) + 2
    lines = [f"{'':46}" + "".join(f"{n:>{width}}" for n in names)]
    for row in found["measures"]:
        cells = [one["measures"].get(row["key"]) for one in columns]
        if found["difference"]:
            cells.append(found["difference"].get(row["key"]))
        if any(cells):
            title = f"{row['title']}, {row['unit']}" if row["unit"] and "(" not in row["title"] else row["title"]
            lines.append(f"{title[:46]:46}" + "".join(f"{_cell(c):>{width}}" for c in cells))
    return "\n".join(lines)


def _cell(measure: dict[str, Any] | None) -> str:
    if measure is None:
        return ""
    interval = "" if measure["low"] is None else f" [{measure['low']:.3f}, {measure['high']:.3f}]"
    return f"{measure['value']:.3f}{interval}"


def write_cards(folder: Path, found: dict[str, Any]) -> None:
    """cards/MODEL/*.md, and beside each the module's experts as a file for `emo-jax subset` and `--subset`."""
    for one in found["models"]:
        place = folder / "cards" / one["name"]
        place.mkdir(parents=True, exist_ok=True)
        modules = [(f"cluster-{c['id']:02d}", c) for c in one["clusters"]] + [(s["name"], s) for s in one["subsets"]]
        for name, module in modules:
            if module["removal"]:
                experts_of(module, one).save(place / f"{name}.json")
            write_text(place / f"{name}.md", card(name, module, one))


def card(name: str, module: dict[str, Any], one: dict[str, Any]) -> str:
    """Markdown: enough to audit, name or disable a module."""
    tokens = sum(c["tokens"] for c in one["clusters"])
    lines = [f"# {name}: {module['name']}" if name != module["name"] else f"# {name}"]
    what = "cluster of tokens" if "id" in module else f"subset of {module['share']:.1%} of the experts"
    lines += ["", f"A {what} of `{one['name']}` (`{one['checkpoint']}`), by what the routers do with {tokens:,} tokens of "
              f"text: {module['tokens']:,} tokens ({module['tokens'] / tokens:.1%}) in {module['documents']:,} documents."]
    lines += ["", "## What it is for", "", "| label | share of its tokens |", "| --- | --- |"]
    lines += [f"| {_text(label) or '(no label)'} | {share:.1%} |" for label, share in list(module["labels"].items())[:8]]
    if module["words"]:
        lines += ["", "Words that it has more often than other text (how many times): " + ", ".join(
            f"{_text(w['text'])} ({w['lift']:.1f})" for w in module["words"]) + "."]
    lines += ["", "## Where it is found", ""]
    lines += [f"* …{_text(c['before'])}**{_text(c['token']).strip() or '␣'}**{_text(c['after'])}…" for c in module["contexts"]]
    lines += ["", "## Its experts", "", "The strongest of each layer: the share of the router's probability that its tokens "
              "give them, and how many times that is their share in all text.", "", "| layer | experts |", "| --- | --- |"]
    lines += [f"| {layer} | " + ", ".join(f"{e} ({share:.0%}, {lift:.1f} times)" for e, share, lift in experts) + " |"
              for layer, experts in enumerate(module["experts"])]
    lines += ["", "## What is lost without it", "", *_removal(name, module, one)]
    others = sorted(((share, c) for c, share in enumerate(module.get("overlap", ())) if c != module["id"]), reverse=True)[:5]
    if others:
        lines += ["", "## Modules that use the same experts", "", "| module | experts in common |", "| --- | --- |"]
        lines += [f"| cluster-{c:02d}: {_text(one['clusters'][c]['name'])} | {share:.0%} |" for share, c in others]
    return "\n".join(lines) + "\n"


def _removal(name: str, module: dict[str, Any], one: dict[str, Any]) -> list[str]:
    if not module["removal"]:
        return ["Not measured."]
    rises = sorted(module["removal"]["loss"].items(), key=lambda pair: (pair[0] != "all", -pair[1]))
    count = len(module["removal"]["experts"][0])
    return [f"Rise of the loss, nats/token, without its {count} experts a layer:", "", "| label | rise |", "| --- | --- |",
            *(f"| {_text(label) or '(no label)'} | {rise:+.4f} |" for label, rise in rises), "",
            f"Without it: `emo-jax subset disable RUN --subset {name}.json --out rest.json`, then `--subset rest.json`."]


def _text(raw: str) -> str:
    """As Markdown that shows it as it is."""
    shown = " ".join(raw.split()) if raw.strip() else raw.replace("\n", " ")
    shown = (" " if raw[:1].isspace() else "") + shown.strip() + (" " if raw[-1:].isspace() and raw.strip() else "")
    return "".join("\\" + c if c in "\\`*_|[]#<>" else c for c in shown)
