"""Curves over training, against values made by hand."""

import math
from dataclasses import replace

import pytest

from logs import make_log, two_task_grams
from reconmtl.comparing import compare
from reconmtl.plan import Plan
from reconmtl.reporting.curves import PANELS, Learning, Scores
from reconmtl.reporting.material import Material, Point
from reconmtl.reporting.windows import Windows
from reconmtl.runs import Run
from studies import material


def test_layers_rates_are_those_of_their_windows() -> None:
    log = make_log(two_task_grams([[-0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, math.nan]]))
    of = material(log, Plan(tasks=["a", "b"], layers=["l0"]))
    scores = Scores.of(of, Windows.of(log, severity=-0.1))
    assert scores is not None
    assert scores.rates[:, 0].tolist() == [1, 1, 1, 0] and scores.rates[:3, 1].tolist() == [0, 0, 1]
    assert math.isnan(scores.rates[3, 1]) and scores.totals.tolist() == [0.75, pytest.approx(1 / 3)]
    assert scores.split.tolist() == [True, False] and scores.last == 4
    said = scores.conclusion().replace("\u00a0", " ")
    assert "100.0 % of their pairs at first and 0.0 % at last, the others in 0.0 % and n/a" in said
    assert "above the others in 2 of 3 windows" in said
    assert "l0" in scores.html().text and scores.named() == [0, 1]


def learned(values: dict[str, list[list[float]]], tasks: int = 1, best: str = "max") -> Material:
    """Label -> accuracy per seed and epoch, the same for each task."""
    names = [f"t{i}" for i in range(tasks)]
    runs, curves = [], []
    for label, seeds in values.items():
        for seed, of in enumerate(seeds):
            metrics = {t: {"acc": of[-1]} for t in names}
            directions = {t: {"acc": best} for t in names}
            runs.append(Run("joint", label, seed, metrics, directions, 1, 1.0, "f", "Net"))  # type: ignore[arg-type]
            curves.append(tuple(Point(e, {t: {"acc": v} for t in names}) for e, v in enumerate(of, start=1)))
    return replace(material(None), runs=tuple(runs), curves=tuple(curves), comparison=compare(runs))


def test_bands_hold_lowest_mean_and_highest_of_the_epochs_all_seeds_have() -> None:
    found = Learning.of(learned({"x": [[1, 2, 9], [3, 6]], "y": [[5, 5, 5]]}))
    assert found is not None
    x, y = found.panels[0].bands
    assert (x.epochs, x.low, x.mean, x.high, x.seeds) == ((1, 2), (1, 2), (2, 4), (3, 6), 2)
    assert (y.epochs, y.seeds) == ((1, 2, 3), 1)
    assert found.conclusion() == "y ends best on t0 acc (5.000)."
    least = Learning.of(learned({"x": [[1, 2]], "y": [[5, 5]]}, best="min"))
    assert least is not None
    assert least.conclusion() == "x ends best on t0 acc (2.000); with one seed the order may be chance."


def test_many_metrics_become_their_mean_over_tasks() -> None:
    few, many = (Learning.of(learned({"x": [[1, 2]]}, tasks=n)) for n in (PANELS, PANELS + 1))
    assert few is not None and len(few.panels) == PANELS
    assert many is not None and [p.title for p in many.panels] == ["acc, mean over 7 tasks"]


def test_values_that_are_no_numbers_break_the_line_and_nothing_else() -> None:
    found = Learning.of(learned({"x": [[1, math.nan, 3]], "y": [[math.nan] * 3]}))
    assert found is not None
    assert found.conclusion().startswith("x ends best")
    assert "nan" not in found.html().text.lower()
    nothing = Learning.of(learned({"x": [[math.nan]]}))
    assert nothing is not None and nothing.conclusion() == "No method has a last value." and nothing.html().text
    assert Learning.of(material(None)) is None
