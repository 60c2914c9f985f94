"""report.html of an analysis: one file that needs no network.

Everything it shows is in it, in compressed blocks that are unpacked when they are looked at, so that it opens at once. Names
and text of documents only ever become text nodes; a policy in the page forbids to load anything.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.analysis.page.contents import Contents, read
from emo_jax.analysis.page.figures import COLORS, charts, expert_use, library, write_figures
from emo_jax.analysis.page.questions import questions
from emo_jax.analysis.page.words import overview, verdict
from emo_jax.files import write_text

__all__ = ["write_figures", "write_page"]
HERE = Path(__file__).parent
SCRIPTS = ("page.js", "charts.js", "overview.js", "clusters.js", "reader.js", "views.js", "start.js")  # in this order
EXPERTS_SHOWN = 5  # of a label and layer


def write_page(folder: Path) -> Path:
    """report.html from analysis.json and documents.npz of `folder`. Raises `InputError` without vl-convert-python."""
    bundle, contents = library().javascript_bundle(), read(folder)
    specs = charts(contents.found)
    blocks = [_block("library", bundle.encode()), _json_block("contents", _told(contents, list(specs)))]
    blocks += [_json_block(f"chart-{name}", spec) for name, spec in specs.items()]
    blocks += [_json_block(name, contents.arrays[name].tolist()) for name in ("title", "vocabulary")]
    blocks += [_block(f"array-{name}", x.tobytes(), x.dtype.name) for name, x in _arrays(contents).items()]
    parts = {
        "title": escape(" and ".join(one["name"] for one in contents.found["models"])),
        "style": (HERE / "page.css").read_text(),
        "script": "\n".join((HERE / name).read_text() for name in SCRIPTS), "blocks": "\n".join(blocks),
    }
    page = re.sub("@@([a-z]+)@@", lambda match: parts[match[1]], (HERE / "page.html").read_text())
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _told(contents: Contents, names: list[str]) -> dict[str, Any]:
    """What every view needs: numbers and sentences, without what is in the charts."""
    found, rows = contents.found, []
    for row in contents.found["measures"]:
        d = (found["difference"] or {}).get(row["key"])
        rows.append(row | {"verdict": verdict(d, row["better"]) if d else ""})
    models = [{key: value for key, value in one.items() if key not in ("coverage", "similarity", "by_layer", "keep_curve")}
              | {"experts_of_label": _experts_of_label(one)} for one in found["models"]]
    asked = [question._asdict() for question in questions(contents)]
    return found | {"models": models, "measures": rows, "overview": overview(found), "questions": asked, "charts": names,
                    "colors": COLORS}


def _experts_of_label(one: dict[str, Any]) -> list[list[list[list[float]]]]:
    """[G][L][most used experts][expert, share of the label's choices, how many times its share over labels]"""
    use = expert_use(one)
    lift, order = use / np.maximum(use.mean(axis=0), 1e-9), np.argsort(-use, axis=2, kind="stable")[..., :EXPERTS_SHOWN]
    return [[[[int(e), round(use[g, layer, e], 4), round(lift[g, layer, e], 2)] for e in experts]
             for layer, experts in enumerate(layers)] for g, layers in enumerate(order)]


def _arrays(contents: Contents) -> dict[str, np.ndarray]:
    """Of types that JavaScript has; of the experts an array for each layer, which compresses better and is unpacked alone."""
    arrays = contents.arrays
    made = {"label": arrays["label"].astype(np.uint16), "shown": arrays["shown"].astype(np.int32),
            "starts": arrays["starts"].astype(np.int32), "tokens": arrays["tokens"].astype(np.int32)}
    for i, one in enumerate(contents.found["models"]):
        made[f"map_{i}"] = arrays[f"map_{i}"].astype(np.float32).round(2)
        made[f"clusters_{i}"] = arrays[f"clusters_{i}"].astype(np.uint8)
        made[f"strongest_{i}"] = contents.strongest_cluster(i).astype(np.int16)
        experts = arrays[f"experts_{i}"]
        small = np.uint8 if one["experts"] <= 256 else np.uint16
        made |= {f"experts_{i}_{layer}": experts[:, layer].astype(small) for layer in range(one["layers"])}
    return made


def _json_block(name: str, value: Any) -> str:
    return _block(name, json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode())


def _block(name: str, raw: bytes, dtype: str = "") -> str:
    """An element that no browser runs or shows."""
    packed = base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}" data-type="{dtype}">{packed}</script>'
