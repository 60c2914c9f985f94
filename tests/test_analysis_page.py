"""The page of an analysis and its figures, from made-up results; in a browser: test_analysis_browser.py."""

import base64
import gzip
import html
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from analysis_example import STRANGE, STRANGE_LABEL, write_example

pytest.importorskip("vl_convert", reason="the page needs vl-convert-python, in the extra `report`")
from emo_jax.analysis.page import contents, figures, words, write_page
from emo_jax.analysis.page.questions import questions
from emo_jax.errors import InputError


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two models; the text and the label of a document look like markup."""
    return write_page(write_example(tmp_path_factory.mktemp("page"), strange=(STRANGE,), strange_label=STRANGE_LABEL))


def _unpacked(page):
    found = re.findall(r'<script type="application/gzip" id="([^"]+)" data-type="(\w*)">([^<]*)</script>', page.read_text())
    return {name: (kind, gzip.decompress(base64.b64decode(packed))) for name, kind, packed in found}


def test_the_page_holds_everything_and_names_no_other_place(page):
    blocks, shell = _unpacked(page), re.sub(r'(<script type="application/gzip"[^>]*>)[^<]*', r"\1", page.read_text())
    assert not re.findall(r"https?://", shell)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", shell)
    assert "default-src 'none'" in shell
    assert STRANGE not in page.read_text() and STRANGE_LABEL not in page.read_text()
    found = json.loads((page.parent / "analysis.json").read_text())
    told = json.loads(blocks["contents"][1])
    assert told["data"] == found["data"] and len(told["models"][0]["clusters"]) == len(found["models"][0]["clusters"])
    with np.load(page.parent / "documents.npz") as arrays:
        kind, raw = blocks["array-experts_1_2"]
        np.testing.assert_array_equal(np.frombuffer(raw, kind), arrays["experts_1"][:, 2])
        assert json.loads(blocks["vocabulary"][1]) == arrays["vocabulary"].tolist()


def test_every_figure_is_a_drawing_in_svg_and_png(page):
    written = figures.write_figures(page.parent)
    charts = json.loads(_unpacked(page)["contents"][1])["charts"]
    assert sorted(path.name for path in written) == sorted(f"{name}.{suffix}" for name in charts for suffix in ("png", "svg"))
    for path in written:
        if path.suffix == ".svg":
            drawing = ElementTree.fromstring(path.read_text())
            assert len([e for e in drawing.iter() if e.tag.endswith("path")]) > 10, f"{path.name} is empty"
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("change", [dict(models=1, keep_curves=False), dict(labels=1), dict(layers=1, clusters=2)], ids=str)
def test_less_than_everything_makes_a_page_too(tmp_path, change):
    page = write_page(write_example(tmp_path, **change))
    told = json.loads(_unpacked(page)["contents"][1])
    assert len(told["overview"]) == (3 if change.get("models") == 1 else 4)
    assert ("keep-curves" in told["charts"]) == change.get("keep_curves", True)
    assert len(told["questions"]) >= 8


def test_what_is_not_known_is_null_in_the_page(tmp_path):
    folder = write_example(tmp_path)
    found = json.loads((folder / "analysis.json").read_text())
    found["models"][0]["measures"]["label_information"] = dict.fromkeys(("value", "low", "high", "baseline"), float("nan"))
    found["models"][0]["clusters"][1]["removal"]["loss"]["law"] = float("nan")
    found["models"][0]["coverage"]["use"][1] = [[float("nan")] * 15] * 3  # a label without tokens
    (folder / "analysis.json").write_text(json.dumps(found))
    blocks = _unpacked(write_page(folder))
    told = json.loads(blocks["contents"][1], parse_constant=pytest.fail)
    assert told["models"][0]["measures"]["label_information"]["value"] is None
    removal = json.loads(blocks["chart-removal-0"][1], parse_constant=pytest.fail)
    assert "<path" in figures.library().vegalite_to_svg(figures.as_file(removal))


def test_a_difference_is_clear_only_where_its_interval_leaves_out_zero(tmp_path):
    found = json.loads((write_example(tmp_path) / "analysis.json").read_text())
    found["difference"] = {"loss": dict(value=0.2, low=0.1, high=0.3), "top_quarter": dict(value=0.2, low=0.1, high=0.3),
                           "pool_overlap": dict(value=0.2, low=-0.1, high=0.5),
                           "silhouette": dict(value=9.0, low=None, high=None)}
    found["measures"] = [row for row in found["measures"] if row["key"] in found["difference"]]
    v = words.verdicts(found)
    assert v.worse == ["Loss with all experts"]
    assert v.better == ["Routing mass in a document's top 25 %"]
    assert v.unclear == ["Pools alike within a label", "Silhouette of the clusters"]
    assert "clearly better than std_tiny in 1 and clearly worse in 1; in 2" in words.overview(found)[-1]["text"]


def test_the_answers_hold_the_numbers_of_the_data(tmp_path):
    found = contents.read(write_example(tmp_path))
    answers = {q.question: q.answer for q in questions(found)}
    assert len(answers) >= 10
    c = max(found.found["models"][0]["clusters"], key=lambda c: c["tokens"])
    assert f"{c['tokens']:,} tokens" in answers[f"What is cluster {c['id']}?"]
    costs = [(rise, label, c["id"]) for c in found.found["models"][0]["clusters"] if c["removal"]
             for label, rise in c["removal"]["loss"].items() if label != "all"]
    rise, label, cluster = max(costs)
    answer = answers["What breaks if I drop a cluster?"]
    assert f"is {cluster}: " in answer and f"the loss of {label} changes by {words.number(rise, True)} nats" in answer


def test_clusters_that_a_random_router_has_too_are_not_called_topics(tmp_path):
    found = contents.read(write_example(tmp_path))
    asked = "Do modules follow topics or words?"
    assert {q.question: q.answer for q in questions(found)}[asked].startswith("Topics to a large part")
    found.found["random_router"]["measures"]["cluster_label"]["value"] = 0.95  # 0.94 in the model
    assert {q.question: q.answer for q in questions(found)}[asked].startswith("Not shown")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is not what emo-jax analyze writes"):
        write_page(tmp_path)
    folder = write_example(tmp_path)
    (folder / "documents.npz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="is not what emo-jax analyze writes"):
        write_page(folder)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(InputError, match=re.escape("pip install 'emo-jax[report]'")):
        write_page(folder)


def test_a_name_of_a_model_is_never_markup(tmp_path):
    folder = write_example(tmp_path, models=1)
    found = json.loads((folder / "analysis.json").read_text())
    found["models"][0]["name"] = STRANGE
    (folder / "analysis.json").write_text(json.dumps(found))
    shell = write_page(folder).read_text()
    assert STRANGE not in shell and html.escape(STRANGE) in shell
