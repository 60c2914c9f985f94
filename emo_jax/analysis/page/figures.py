"""The charts of an analysis as Vega-Lite specifications: in the page, and as PNG and SVG.

Vega-Lite, because one description of a chart serves the page, both file formats (vl-convert, which brings the library along)
and a reader who wants to change it; its 0.9 MB are embedded once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.errors import InputError

Spec = dict[str, Any]
# Okabe and Ito's colours, told apart with any kind of colour vision. Beyond them a shape is the second cue.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d00", "#666666"]
SHAPES = ["circle", "triangle-up", "square", "diamond", "cross", "triangle-down"]
_LIGHT = {"background": "white", "font": "system-ui, sans-serif", "view": {"stroke": None},
          "axis": {"gridColor": "#e6e6e6", "domainColor": "#bbb", "tickColor": "#bbb", "labelColor": "#444",
                   "titleColor": "#444"}}
_LEGEND = {"orient": "top", "labelLimit": 300}
_TITLES = {"cosine": "cosine similarity of expert use", "pool_overlap": "experts that the pools of two documents share"}


def library() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise InputError("the report needs vl-convert-python: pip install 'emo-jax[report]'") from None
    return vl_convert


def charts(found: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Spec]:
    """By name; a name that ends in -0 or -1 is of that model."""
    made: dict[str, Spec] = {}
    curves = [(one["name"], one["keep_curve"]) for one in found["models"] if one["keep_curve"]]
    if curves:
        made["keep-curve"] = keep_curve(curves)
    units = {row["key"]: row for row in found["measures"]}
    for key in found["models"][0]["by_layer"]:
        made[f"layers-{key}"] = by_layer(found["models"], units[key])
    for i, one in enumerate(found["models"]):
        for kind in _TITLES:
            made[f"{kind}-{i}"] = label_by_label(one, found["data"]["labels"], kind)
        made[f"use-{i}"] = label_by_expert(one, found["data"]["labels"])
        made[f"effective-{i}"] = label_by_layer(one, found["data"]["labels"])
        made[f"map-{i}"] = document_map(one, found["data"]["labels"], arrays, i)
    return made


def write_figures(folder: Path, specs: dict[str, Spec]) -> None:
    """figures/*.svg and *.png"""
    convert, place = library(), folder / "figures"
    place.mkdir(exist_ok=True)
    for name, spec in specs.items():
        still = {"width": 560, "height": 360} | spec | {"config": _LIGHT}
        still = {key: 560 if value == "container" else value for key, value in still.items()}
        svg = convert.vegalite_to_svg(still)
        (place / f"{name}.svg").write_text(svg)
        (place / f"{name}.png").write_bytes(convert.svg_to_png(svg, scale=2))


# ---- the charts -----------------------------------------------------------------------------------------------------


def by_layer(models: list[dict[str, Any]], row: dict[str, Any]) -> Spec:
    values = []
    for one in models:
        measure = one["by_layer"][row["key"]]
        for layer, value in enumerate(measure["value"]):
            low, high = (measure[side][layer] if measure[side] else value for side in ("low", "high"))
            values.append({"model": one["name"], "layer": layer, "value": _short(value), "low": _short(low),
                           "high": _short(high)})
    x = {"field": "layer", "type": "quantitative", "title": "layer",
         "axis": {"values": sorted({v["layer"] for v in values}), "format": "d", "grid": False}}
    y = {"type": "quantitative", "title": row["unit"] or row["title"], "scale": {"zero": False}}
    return _chart(f"{row['title']}, by layer", values, height=180, layer=[
        {"mark": {"type": "area", "opacity": 0.18}, "encoding": {
            "x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": _model_color(models)}},
        {"mark": {"type": "line", "point": {"size": 45, "filled": True}}, "encoding": {
            "x": x, "y": y | {"field": "value"}, "color": _model_color(models), "strokeDash": _dash(models), "tooltip": [
                {"field": "model"}, {"field": "layer"}, {"field": "value"}, {"field": "low"}, {"field": "high"}]}}])


def keep_curve(curves: list[tuple[str, Any]]) -> Spec:
    """Of the results of `emo-jax eval --keep`."""
    values = []
    for name, curve in curves:
        values.append({"model": name, "share": 100, "difference": 0, "low": 0, "high": 0})
        for row in curve["subsets"]:
            low, high = row["interval"] or [row["difference"]] * 2
            values.append({"model": name, "share": _short(100 * row["share"]), "difference": _short(row["difference"]),
                           "low": _short(low), "high": _short(high)})
    models = [{"name": name} for name, _ in curves]
    x = {"field": "share", "type": "quantitative", "title": "experts kept, %",
         "scale": {"type": "log", "base": 2, "reverse": True},
         "axis": {"values": sorted({v["share"] for v in values}), "grid": False}}
    y = {"type": "quantitative", "title": "loss above the full model's, nats/token"}
    return _chart("Loss with few experts", values, height=260, layer=[
        {"mark": {"type": "area", "opacity": 0.18}, "encoding": {
            "x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": _model_color(models)}},
        {"mark": {"type": "line", "point": {"size": 55, "filled": True}}, "encoding": {
            "x": x, "y": y | {"field": "difference"}, "color": _model_color(models), "strokeDash": _dash(models), "tooltip": [
                {"field": "model"}, {"field": "share", "title": "kept, %"}, {"field": "difference"}, {"field": "low"},
                {"field": "high"}]}}])


def label_by_label(one: dict[str, Any], labels: list[str], kind: str) -> Spec:
    values = [{"layer": layer, "label": _name(a), "other": _name(b), "value": _short(row[i][j])}
              for layer, row in enumerate(one["similarity"][kind]) for i, a in enumerate(labels) for j, b in enumerate(labels)]
    return _heatmap(f"{one['name']}: {_TITLES[kind]}", values, one["layers"], "other", "label", "value", square=True)


def label_by_expert(one: dict[str, Any], labels: list[str]) -> Spec:
    """The experts in the order of their strongest label, so that modules are blocks on the diagonal."""
    values = []
    for layer in range(one["layers"]):
        use = np.array([rows[layer] for rows in one["coverage"]["use"]])  # [G, R]
        order = np.lexsort((-use.max(axis=0), use.argmax(axis=0)))
        values += [{"layer": layer, "label": _name(label), "place": place, "expert": int(e), "share": _short(use[g, e])}
                   for g, label in enumerate(labels) for place, e in enumerate(order)]
    title = f"{one['name']}: share of a label's choices that each expert has"
    spec = _heatmap(title, values, one["layers"], "place", "label", "share")
    spec["encoding"]["x"] |= {"title": "experts, by their strongest label", "axis": {"labels": False, "ticks": False}}
    spec["encoding"]["tooltip"] = [{"field": "label"}, {"field": "expert"}, {"field": "share"}]
    return spec


def label_by_layer(one: dict[str, Any], labels: list[str]) -> Spec:
    values = [{"label": _name(label), "layer": layer, "experts": _short(count)}
              for label, row in zip(labels, one["coverage"]["effective"]) for layer, count in enumerate(row)]
    title = f"{one['name']}: effective experts of a label (of {one['experts']})"
    return _chart(title, values, height={"step": 18}, mark="rect",
                  encoding={"x": {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelAngle": 0}},
                            "y": {"field": "label", "type": "nominal", "title": None},
                            "color": _shade("experts"), "tooltip": [{"field": f} for f in ("label", "layer", "experts")]})


def document_map(one: dict[str, Any], labels: list[str], arrays: dict[str, np.ndarray], i: int) -> Spec:
    places, label = np.round(arrays[f"map_{i}"].astype(float), 1), arrays["label"]
    values = [{"document": d, "x": x, "y": y, "label": _name(labels[g]), "title": title}
              for d, ((x, y), g, title) in enumerate(zip(places.tolist(), label.tolist(), arrays["title"].tolist()))]
    names = [_name(label) for label in labels]
    colors = [COLORS[n % len(COLORS)] for n in range(len(names))]
    shapes = [SHAPES[n // len(COLORS) % len(SHAPES)] for n in range(len(names))]
    hidden = {"axis": None, "scale": {"zero": False}, "type": "quantitative"}
    key = {"field": "label", "type": "nominal", "title": None}
    return _chart(f"{one['name']}: documents that use the same experts lie together", values, height=460,
                  params=[{"name": "chosen", "select": {"type": "point", "fields": ["label"]}, "bind": "legend"}],
                  mark={"type": "point", "filled": True, "size": 40}, encoding={
                      "x": hidden | {"field": "x"}, "y": hidden | {"field": "y"},
                      "color": key | {"scale": {"domain": names, "range": colors}},
                      "shape": key | {"scale": {"domain": names, "range": shapes}},
                      "opacity": {"condition": {"param": "chosen", "value": 0.85}, "value": 0.06},
                      "tooltip": [{"field": "label"}, {"field": "title"}]})


def _heatmap(title: str, values: list[dict[str, Any]], layers: int, x: str, y: str, value: str, square: bool = False) -> Spec:
    """With a slider for the layer."""
    return _chart(title, values, height={"step": 18}, mark="rect",
                  params=[{"name": "shown", "value": layers // 2, "bind": {
                      "input": "range", "min": 0, "max": layers - 1, "step": 1, "name": "layer "}}],
                  transform=[{"filter": "datum.layer == shown"}],
                  encoding={"x": {"field": x, "type": "nominal" if square else "ordinal", "title": None},
                            "y": {"field": y, "type": "nominal", "title": None}, "color": _shade(value),
                            "tooltip": [{"field": y}, {"field": x}, {"field": value}]})


def _chart(title: str, values: list[dict[str, Any]], **more: Any) -> Spec:
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "title": {"text": title, "anchor": "start"},
            "description": title, "width": "container", "data": {"values": values}} | more


def _model_color(models: list[dict[str, Any]]) -> dict[str, Any]:
    names = [one["name"] for one in models]
    return {"field": "model", "type": "nominal", "title": None, "scale": {"domain": names, "range": COLORS[:len(names)]},
            "legend": _LEGEND}


def _dash(models: list[dict[str, Any]]) -> dict[str, Any]:
    """The second cue."""
    names = [one["name"] for one in models]
    return {"field": "model", "type": "nominal", "title": None, "legend": _LEGEND,
            "scale": {"domain": names, "range": [[1, 0], [5, 3]][:len(names)]}}


def _shade(field: str) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": None, "scale": {"scheme": "cividis"},
            "legend": {"orient": "top", "gradientLength": 200}}


def _name(label: str) -> str:
    return label or "(no label)"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
