"""What figures have in common."""

import itertools
import runpy
import sys
from pathlib import Path

import numpy as np
from pytest import approx

from emo_jax import plots


def test_names_at_line_ends_cover_no_other(tmp_path):
    seen = []

    def draw(axis):
        seen.append(axis)
        for i in range(4):
            plots.line(axis, f"model {i}", [1.0, 0.5], [0.0, 0.01 * i], plots.COLORS[i], [0, 0], [0.02, 0.02])
        plots.line(axis, "far\naway", [1.0, 0.5], [0.0, 1.0], plots.COLORS[4], dashed=True)
        plots.experts_kept(axis, [1.0, 0.5])

    assert plots.save(tmp_path / "new" / "figure.png", 1, (5, 3), draw) == tmp_path / "new" / "figure.png"
    axis, = seen
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    assert [boxes[f"model {i}"].y0 for i in range(4)] == sorted(boxes[f"model {i}"].y0 for i in range(4))
    assert boxes["model 0"].y0 > axis.bbox.y0 - 1  # not over the labels of the axis below
    end = axis.transData.transform((0.5, 1.0))[1]
    assert boxes["far\naway"].y0 < end < boxes["far\naway"].y1


def test_without_matplotlib_there_is_no_figure_but_a_hint(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.save(tmp_path / "figure.png", 1, (5, 3), lambda axis: None) is None
    assert "pip install 'emo-jax[report]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_picture_of_the_method_shows_what_the_router_does():
    script = runpy.run_path(str(Path(__file__).parent.parent / "launch" / "method.py"))
    t = script["toy"]()
    starts = np.unique(t["segments"], return_index=True)[1]
    assert t["pool"][starts].sum(1).tolist() == t["sizes"].tolist()
    assert np.take_along_axis(t["pool"], t["expert_ids"], 1).all()
    (row, row_loss), (batch, batch_loss) = t["loads"].values()
    assert row.sum() == approx(1) and batch.sum() == approx(1)
    assert row_loss > 1.3 and 1 < batch_loss < 1.05  # what the picture says of them
    for theme in script["THEMES"].values():
        assert len(script["draw"](theme, t).axes[0].texts) > 100
