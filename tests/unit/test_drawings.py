"""Figures of experiments: both files are written, what is on them is what was given, and nothing writes nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from reconmtl.comparing import Spread
from reconmtl.errors import RunError
from reconmtl.paper.drawings import Dot, Panel, Point, columns, dots, lines, save, stacked


def test_dots_hold_ours_and_the_papers_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Dot("a $ w/ Recon", Spread.of([1.0, 3.0]), -4.0), Dot("b", Spread.of([5.0]))]
    figure = dots(rows, "Δm")
    (axes,) = figure.axes
    drawn = [tuple(np.asarray(line.get_xdata()).tolist()) for line in axes.get_lines()]
    assert (2.0,) in drawn and (-4.0,) in drawn and (5.0,) in drawn
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a $ w/ Recon", "b"]
    first = save(lambda: dots(rows, "Δm"), tmp_path / "new", "x")
    assert first == tmp_path / "new" / "x.png"
    again = save(lambda: dots(rows, "Δm"), tmp_path, "y")
    assert again is not None and again.read_bytes() == first.read_bytes()
    assert (tmp_path / "x.pdf").exists() is False and (tmp_path / "new" / "x.pdf").read_bytes()[:5] == b"%PDF-"


def test_columns_hold_rows_of_one_name_at_one_height_with_axes_of_their_own() -> None:
    pytest.importorskip("matplotlib")
    near, far = Dot("recon", Spread.of([7.0, 9.0])), Dot("random", Spread.of([-40.0]))
    first, second = columns({"per task": [near], "shared": [far, near]}, "gain").axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["recon", "random"]
    drawn = [[np.asarray(line.get_xydata()) for line in axes.get_lines()] for axes in (first, second)]
    dots_of = [{tuple(of[0].tolist()) for of in lines_ if len(of) == 1} for lines_ in drawn]
    assert dots_of == [{(8.0, 0.0)}, {(-40.0, 1.0), (8.0, 0.0)}]
    assert first.get_xlim() != second.get_xlim()
    assert {text.get_text() for text in second.texts} == {"n = 1", "n = 2"}


def test_lines_of_the_same_points_have_their_ticks_there() -> None:
    pytest.importorskip("matplotlib")
    of = {n: [Point(x, Spread.of([1.0])) for x in (2, 5, 10, 20, 40)] for n in ("a", "b")}
    (axes,) = lines([Panel("tasks", of, log=True)], "cost").axes
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "5", "10", "20", "40"]


def test_lines_join_points_and_both_settings_of_the_statistics_share_a_colour(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    point = Point(0.5, Spread.of([1.0, 2.0]))
    of = {
        "curve": [Point(0.1, Spread.of([1.0])), Point(0.2, Spread.of([2.0]))],
        "way": [point],
        "way (shared statistics)": [point],
        "joint": [Point(0.0, Spread.of([0.0]))],
    }
    figure = lines([Panel("added MB", of, log=True), Panel("operations", of)], "gain")
    assert [axes.get_xscale() for axes in figure.axes] == ["symlog", "linear"]
    curve, way, shared, _ = (bars[0] for bars in figure.axes[0].containers)
    assert list(map(float, curve.get_xdata())) == [0.1, 0.2] and curve.get_linestyle() == "-"
    assert way.get_color() == shared.get_color() and shared.get_markerfacecolor() == "white"
    assert save(lambda: None, tmp_path, "nothing") is None and not list(tmp_path.iterdir())


def test_bars_of_layers_add_up_and_begin_with_the_worst_conflicts() -> None:
    pytest.importorskip("matplotlib")
    shares = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [np.nan] * 3])  # of 1 to 0, 0 to -0.1, -0.1 to -1
    (axes,) = stacked(["a", "b", "c"], shares, (0.0, -0.1)).axes
    widths = np.array([[bar.get_width() for bar in group] for group in axes.containers])
    np.testing.assert_allclose(widths, [[20, 0, 0], [30, 0, 0], [50, 100, 0]])
    assert axes.containers[2][0].get_x() == pytest.approx(50)
    _, names = axes.get_legend_handles_labels()
    assert names == ["\u22120.1 to \u22121", "0 to \u22120.1", "1 to 0"]


def test_without_matplotlib_the_way_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r'pip install "reconmtl\[figures\]"'):
        save(lambda: None, tmp_path, "x")
