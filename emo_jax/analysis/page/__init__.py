"""report.html: an analysis as one file that needs no network.

The numbers, the charts and the arrays of `documents.npz` are in it compressed, and charts are drawn when they are looked at, so
that it opens at once; text of documents only ever becomes text nodes of the page.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.analysis.page.figures import charts, library, write_figures
from emo_jax.files import write_text

HERE = Path(__file__).parent


def write_page(folder: Path, figures: bool = True) -> Path:
    """Reads analysis.json and documents.npz of `folder`; writes report.html and figures/. Needs vl-convert-python."""
    found = json.loads((folder / "analysis.json").read_text())
    with np.load(folder / "documents.npz") as file:
        arrays = dict(file)
    specs = charts(found, arrays)
    if figures:
        write_figures(folder, specs)
    content = _rounded({"analysis": found, "charts": specs, "titles": arrays.pop("title").tolist(),
                        "vocabulary": arrays.pop("vocabulary").tolist()})
    parts = {"style": (HERE / "page.css").read_text(), "library": library().javascript_bundle(),
             "script": (HERE / "page.js").read_text(), "content": _packed(json.dumps(content, allow_nan=False).encode()),
             "arrays": _packed(_bytes({name: x for name, x in arrays.items() if not name.startswith("map")})),
             "title": _escaped(" and ".join(one["name"] for one in found["models"]))}
    page = (HERE / "page.html").read_text()
    for name, text in parts.items():
        page = page.replace(f"@@{name}@@", text.replace("</script", "<\\/script") if name in ("library", "script") else text)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """[length of the header, uint32][header: {name: [type, shape, offset]}][arrays, each at a multiple of 8]"""
    header, body = {}, b""
    for name, x in arrays.items():
        small = x.astype({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.int32))
        header[name] = [small.dtype.name, list(small.shape), len(body)]
        body += small.tobytes()
        body += bytes(-len(body) % 8)
    head = json.dumps(header).encode()
    head += b" " * (-(len(head) + 4) % 8)
    return len(head).to_bytes(4, "little") + head + body


def _packed(raw: bytes) -> str:
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
