"""The charts of an analysis as Vega-Lite specifications.

Vega-Lite, because one plain specification gives all three: the chart in the page, PNG and SVG (by vl-convert, which also brings
the library that the page embeds, 0.9 MB).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from emo_jax.analysis.page.contents import Contents, read
from emo_jax.errors import InputError
from emo_jax.rounding import ceil_div

Spec = dict[str, Any]
# Okabe and Ito's colours without yellow, which is too light on white; beyond them a shape is the second cue.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
SHAPES = ("circle", "triangle-up", "square", "diamond", "cross", "triangle-down")
NULL_COLOR = "#7F7F7F"  # of the random router
HEATMAPS = {"cosine": "Labels by the experts that they use: cosine similarity",
            "distance": "Labels by the experts that they use: distance",
            "pool_overlap": "Experts that the pools of two documents have in common"}
HELP = {
    "cosine": "1: two labels use the same experts equally often; 0: none in common.",
    "distance": "0: two labels use the same experts equally often.",
    "pool_overlap": "The mean share of experts that the pools (a quarter of all experts) of two documents share; within a "
                    "label on the diagonal.",
    "use": "Share of a label's choices that each expert has. Experts are in the order of their strongest label, so modules are "
           "blocks along the diagonal.",
    "effective": "How many equally used experts would be as spread as those of the label (exponential of the entropy).",
    "covered": "The share of experts that a label uses more often than if all were used equally.",
    "overlap": "The share of a cluster's strongest experts that it has in common with another cluster.",
    "removal": "The rise of a label's loss, nats/token, when the strongest experts of a cluster are removed.",
}
_LIGHT = {"background": "white", "padding": 16, "font": "DejaVu Sans, system-ui, sans-serif", "view": {"stroke": None},
          "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 14, "subtitleColor": "#666",
                    "subtitlePadding": 6},
          "axis": {"gridColor": "#e8e8e8", "domainColor": "#bbb", "tickColor": "#bbb", "labelColor": "#444",
                   "titleColor": "#444", "titleFontWeight": 400}}
_UPRIGHT: Spec = {"axis": {"labelAngle": -90, "labelLimit": 130}}
_WIDTH = 620  # of a figure in a file, pixels


def library() -> ModuleType:
    """vl-convert. Raises `InputError` where it is not installed."""
    try:
        import vl_convert
    except ImportError:
        raise InputError("the report needs vl-convert-python: pip install 'emo-jax[report]'") from None
    return vl_convert


def write_figures(folder: Path) -> list[Path]:
    """figures/*.svg and *.png of an analysis in `folder`."""
    convert, written, contents = library(), [], read(folder)
    (folder / "figures").mkdir(exist_ok=True)
    for name, spec in charts(contents.found).items():
        rows = document_rows(contents, spec["usermeta"]) if "name" in spec["data"] else None
        svg = convert.vegalite_to_svg(as_file(spec, rows))
        for suffix, raw in ((".svg", svg.encode()), (".png", convert.svg_to_png(svg, scale=2))):
            written.append(folder / "figures" / f"{name}{suffix}")
            written[-1].write_bytes(raw)
    return written


def as_file(spec: Spec, rows: list[dict[str, Any]] | None = None) -> Spec:
    """`spec` for a file: of a fixed width, on white, with its title. rows: for data that only has a name."""
    return spec | {"width": _WIDTH, "config": _LIGHT, "data": spec["data"] if rows is None else {"values": rows},
                   "title": {"text": spec["title"], "subtitle": _lines(spec["description"])}}


def charts(found: dict[str, Any]) -> dict[str, Spec]:
    """By name; one that ends in -0 or -1 is of that model."""
    made = {f"measures-{unit}": measures_of(found, unit) for unit in ("share", "nats")}
    curves = [(one["name"], one["keep_curve"]["rows"]) for one in found["models"] if one["keep_curve"]]
    if curves:
        made["keep-curves"] = keep_curves(curves)
    for row in found["measures"]:
        if row["key"] in found["models"][0]["by_layer"]:
            made[f"layers-{row['key']}"] = by_layer(found["models"], row)
    labels = [label_name(label) for label in found["data"]["labels"]]
    for i, one in enumerate(found["models"]):
        for kind in HEATMAPS:
            made[f"{kind}-{i}"] = label_by_label(one, labels, kind)
        made[f"use-{i}"] = label_by_expert(one, labels)
        for kind in ("effective", "covered"):
            made[f"{kind}-{i}"] = label_by_layer(one, labels, kind)
        made[f"overlap-{i}"] = cluster_overlap(one)
        if any(c["removal"] for c in one["clusters"]):
            made[f"removal-{i}"] = removal_costs(one)
        made[f"map_labels-{i}"] = document_map(one, i, "label", labels)
        made[f"map_clusters-{i}"] = document_map(one, i, "cluster", [cluster_name(c) for c in one["clusters"]])
    return {name: spec for name, spec in made.items() if spec["data"].get("values", True)}


def expert_use(one: dict[str, Any]) -> Float[np.ndarray, "G L R"]:
    """Share of a label's choices that each expert has; 0 for a label without tokens."""
    return np.nan_to_num(np.array(one["coverage"]["use"], float))


def label_name(label: str) -> str:
    return label or "(no label)"


def cluster_name(cluster: dict[str, Any]) -> str:
    return f"{cluster['id']}: {cluster['name']}"


# ---- lines and points -----------------------------------------------------------------------------------------------


def measures_of(found: dict[str, Any], unit: str) -> Spec:
    """The measures of one unit with their intervals, models beside each other."""
    every = [*found["models"], *([found["random_router"]] if found["random_router"] else [])]
    values = []
    for row in found["measures"]:
        for one in every:
            m = one["measures"].get(row["key"])
            if row["unit"] == unit and m and m["value"] is not None:
                values.append({"measure": row["title"], "model": one["name"], **_interval(m["value"], m["low"], m["high"])})
    names = [one["name"] for one in every]
    y = {"field": "measure", "type": "nominal", "sort": None, "title": None,
         "scale": {"paddingInner": 0.5, "paddingOuter": 0.4}, "axis": {  # names above their rows, for narrow screens
             "labelAlign": "left", "labelPadding": 0, "labelOffset": -10 * len(every) - 6, "labelLimit": 320, "ticks": False,
             "domain": False}}
    offset = {"field": "model", "sort": names}
    x, color = {"type": "quantitative", "title": unit, "axis": {"tickCount": 6}}, _model_color(names)
    color["scale"]["range"] = [*COLORS[:len(found["models"])], NULL_COLOR][:len(names)]
    marks = [{"mark": {"type": "rule", "strokeWidth": 6, "opacity": 0.4}, "encoding": {
                 "x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y, "yOffset": offset, "color": color}},
             {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": {
                 "x": x | {"field": "value"}, "y": y, "yOffset": offset, "color": color,
                 "shape": {"field": "model", "type": "nominal", "scale": {"domain": names, "range": list(SHAPES[:len(names)])}},
                 "tooltip": _fields("measure", "model", "value", "low", "high")}}]
    return _chart("Measures between 0 and 1" if unit == "share" else f"Measures in {unit}",
                  "Points are values, bars their 95 % intervals by bootstrap over documents.", values,
                  height=20 * (len(every) + 1) * len({v["measure"] for v in values}), layer=marks)


def by_layer(models: Sequence[dict[str, Any]], row: dict[str, Any]) -> Spec:
    values = []
    for one in models:
        m = one["by_layer"].get(row["key"])
        for layer, value in enumerate(m["value"] if m else ()):
            if value is not None:
                low, high = (m[side][layer] if m[side] else None for side in ("low", "high"))
                values.append({"model": one["name"], "layer": layer, **_interval(value, low, high)})
    x = {"field": "layer", "type": "quantitative", "title": "layer", "axis": {
        "values": list(range(0, models[0]["layers"], ceil_div(models[0]["layers"], 16))), "format": "d", "grid": False}}
    return _chart(row["title"], row["help"], values, height=190, layer=_lines_with_bands(
        [one["name"] for one in models], x, "layer", {"title": row["unit"] or None, "scale": {"zero": False}}))


def keep_curves(curves: Sequence[tuple[str, list[dict[str, Any]]]]) -> Spec:
    """Of `emo-jax eval --keep`."""
    values = []
    for name, rows in curves:
        values += [{"model": name, "share": 100.0, **_interval(0.0, 0.0, 0.0)}]
        values += [{"model": name, "share": 100 * row["share"], **_interval(row["difference"], row["low"], row["high"])}
                   for row in rows]
    x = {"field": "share", "type": "quantitative", "title": "experts kept, %",
         "scale": {"type": "log", "base": 2, "reverse": True, "nice": False},
         "axis": {"values": sorted({v["share"] for v in values}), "grid": False}}
    return _chart("Loss with few experts",
                  "How far the loss rises above the full model's, nats/token, when only some experts are kept.", values,
                  height=300, layer=_lines_with_bands([name for name, _ in curves], x, "share", {"title": "nats/token"}))


def _lines_with_bands(names: Sequence[str], x: Spec, across: str, y: Spec) -> list[Spec]:
    y, color = {"type": "quantitative"} | y, _model_color(names)
    color["legend"] |= {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolSize": 300}
    dash = color | {"scale": {"domain": list(names), "range": [[1, 0], [5, 3]][:len(names)]}}  # the second cue
    return [{"mark": {"type": "area", "opacity": 0.18}, "encoding": {
                "x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": color}},
            {"mark": {"type": "line", "point": {"size": 55, "filled": True}}, "encoding": {
                "x": x, "y": y | {"field": "value"}, "color": color, "strokeDash": dash,
                "tooltip": _fields("model", across, "value", "low", "high")}}]


def _interval(value: float, low: float | None, high: float | None) -> dict[str, float]:
    """A band of no width where there is no interval."""
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


# ---- heatmaps -------------------------------------------------------------------------------------------------------


def label_by_label(one: dict[str, Any], labels: Sequence[str], kind: str) -> Spec:
    values = [{"layer": layer, "label": a, "other": b, "value": rows[i][j]}
              for layer, rows in enumerate(one["similarity"][kind]) for i, a in enumerate(labels) for j, b in enumerate(labels)]
    return _heatmap(one, kind, HEATMAPS[kind], values, "other", "label", "value", across=_UPRIGHT)


def label_by_expert(one: dict[str, Any], labels: Sequence[str]) -> Spec:
    values = []
    for layer in range(one["layers"]):
        use = expert_use(one)[:, layer]
        order = np.lexsort((-use.max(axis=0), use.argmax(axis=0)))
        values += [{"layer": layer, "label": label, "place": place, "expert": int(e), "share": float(f"{use[g, e]:.3g}")}
                   for g, label in enumerate(labels) for place, e in enumerate(order)]
    return _heatmap(one, "use", "Experts that labels use", values, "place", "label", "share", across={
        "title": "experts, by their strongest label", "axis": {"labels": False, "ticks": False}},
                    tooltip=_fields("label", "expert", "share"))


def label_by_layer(one: dict[str, Any], labels: Sequence[str], kind: str) -> Spec:
    title = {"effective": f"Effective experts of a label, of {one['experts']}",
             "covered": "Share of experts that a label uses"}[kind]
    values = [{"label": label, "layer": layer, "value": value} for label, row in zip(labels, one["coverage"][kind])
              for layer, value in enumerate(row)]
    return _heatmap(one, kind, title, values, "layer", "label", "value", across={"title": "layer", "axis": {"labelAngle": 0}},
                    slider=False)


def cluster_overlap(one: dict[str, Any]) -> Spec:
    values = [{"cluster": cluster_name(c), "other": cluster_name(o), "place": o["id"], "value": share}
              for c in one["clusters"] for o, share in zip(one["clusters"], c["overlap"])]
    return _heatmap(one, "overlap", "Clusters by the experts that they use", values, "place", "cluster", "value", slider=False,
                    across={"title": "cluster", "axis": {"labelAngle": 0}}, tooltip=_fields("cluster", "other", "value"))


def removal_costs(one: dict[str, Any]) -> Spec:
    values: list[dict[str, Any]] = [{"cluster": cluster_name(c), "label": label_name(label), "rise": rise}
                                    for c in one["clusters"] if c["removal"]
                                    for label, rise in c["removal"]["loss"].items()]
    spec = _heatmap(one, "removal", "What removing a cluster's experts costs", values, "label", "cluster", "rise", slider=False,
                    across=_UPRIGHT)
    most = max([abs(v["rise"]) for v in values if v["rise"] is not None], default=1)
    spec["encoding"]["color"]["scale"] = {"scheme": "purpleorange", "domain": [-most, most]}
    return spec


def _heatmap(one: dict[str, Any], kind: str, title: str, values: list[dict[str, Any]], x: str, y: str, shade: str,
             slider: bool = True, across: Spec | None = None, tooltip: list[Spec] | None = None) -> Spec:
    """slider: the page moves through the layers by the parameter `layer`."""
    numbers = [v[shade] for v in values if v[shade] is not None] or [0, 1]
    more: Spec = {"params": [{"name": "layer", "value": one["layers"] // 2}],
                  "transform": [{"filter": "datum.layer == layer"}]} if slider else {}
    more |= {"height": 20 * len({v[y] for v in values}), "mark": "rect"}
    return _chart(f"{one['name']}: {title}", HELP[kind], values, **more, encoding={
        "x": {"field": x, "type": "ordinal", "sort": None, "title": None} | (across or {}),
        "y": {"field": y, "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 170}},
        "color": {"field": shade, "type": "quantitative", "title": None, "legend": {"orient": "top", "gradientLength": 180},
                  "scale": {"scheme": "viridis", "domain": [min(numbers), max(numbers)]}},
        "tooltip": tooltip or _fields(y, x, shade)})


# ---- the map --------------------------------------------------------------------------------------------------------


def document_map(one: dict[str, Any], model: int, by: str, names: Sequence[str]) -> Spec:
    """Without its data, which are `document_rows`. `only`: the categories that the page does not fade."""
    key = {"field": "category", "type": "nominal", "title": None, "legend": {"symbolLimit": 60, "labelLimit": 170}}
    place = {"type": "quantitative", "axis": None, "scale": {"zero": False}}
    colors = [COLORS[n % len(COLORS)] for n in range(len(names))]
    shapes = [SHAPES[n // len(COLORS) % len(SHAPES)] for n in range(len(names))]
    spec = _chart(f"{one['name']}: documents by the experts that they use", "Documents that use the same experts lie together. "
                  f"Colour and shape tell the {'label' if by == 'label' else 'cluster of most of its tokens'}.", [], height=520,
                  params=[{"name": "only", "value": []}], encoding={
                      "x": place | {"field": "x"}, "y": place | {"field": "y"},
                      "color": key | {"scale": {"domain": list(names), "range": colors}},
                      "shape": key | {"scale": {"domain": list(names), "range": shapes}},
                      "opacity": {"value": 0.05, "condition": {
                          "test": "!length(only) || indexof(only, datum.category) >= 0", "value": 0.8}},
                      "tooltip": [{"field": "title"}, {"field": "category", "title": by}]})
    return spec | {"mark": {"type": "point", "filled": True, "size": 38, "cursor": "pointer"}, "data": {"name": "documents"},
                   "usermeta": {"model": model, "by": by}}


def document_rows(contents: Contents, which: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a map; page.js makes the same from the arrays that it has anyway."""
    found, arrays, model = contents.found, contents.arrays, which["model"]
    if which["by"] == "label":
        names, of_document = [label_name(label) for label in found["data"]["labels"]], arrays["label"]
    else:
        names, of_document = [cluster_name(c) for c in found["models"][model]["clusters"]], contents.strongest_cluster(model)
    return [{"document": d, "x": round(float(x), 2), "y": round(float(y), 2), "category": names[of_document[d]],
             "title": str(title)} for d, ((x, y), title) in enumerate(zip(arrays[f"map_{model}"], arrays["title"]))
            if of_document[d] >= 0]


# ---- shared ---------------------------------------------------------------------------------------------------------


def _chart(title: str, description: str, values: list[dict[str, Any]], **more: Any) -> Spec:
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "title": title, "description": description,
            "width": "container", "data": {"values": values}, **more}


def _model_color(names: Sequence[str]) -> Spec:
    return {"field": "model", "type": "nominal", "title": None,
            "legend": {"orient": "top", "labelLimit": 300, "columns": 1, "symbolOpacity": 1},
            "scale": {"domain": list(names), "range": list(COLORS[:len(names)])}}


def _fields(*names: str) -> list[Spec]:
    return [{"field": name} for name in names]


def _lines(text: str, width: int = 90) -> list[str]:
    """Vega breaks no lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
