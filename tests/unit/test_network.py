"""The plan as it is drawn and said."""

import itertools

import pytest

from logs import make_log, two_task_grams
from reconmtl.plan import Plan
from reconmtl.reporting.network import Drawing, Lanes
from studies import material


def test_the_plan_is_said_in_numbers_made_by_hand() -> None:
    log = make_log(two_task_grams([[-0.5, -0.5, 0.5], [-0.5, 0.5, 0.5]]))  # sizes 10, 20, 30; conflicts 2, 1, 0
    drawing = Drawing.of(material(log, Plan(tasks=["a", "b"], layers=["l0"])))
    assert drawing is not None
    assert drawing.conclusion().replace("\u00a0", " ") == (
        "1 of 3 shared layers is split, which hold 66.7 % of all conflicts and 16.7 % of the shared parameters; the "
        "copies add 10 parameters (0.000 MB)."
    )
    unknown = Drawing.of(material(log, Plan(tasks=["a", "b"], layers=["l0", "elsewhere"])))
    assert unknown is not None and [r.name for r in unknown.rows] == ["l0", "l1", "l2", "elsewhere"]
    alone = Drawing.of(material(None, Plan(tasks=["a", "b"], layers=["l0"], chosen={"scores": {"l0": 3}})))
    assert alone is not None and alone.rows[0].conflicts == 3
    assert Drawing.of(material(None)) is None


@pytest.mark.parametrize("n", [2, 5, 8, 40])
def test_lines_stay_inside_the_drawing_and_bundles_do_not_touch(n: int) -> None:
    tasks = tuple(f"t{i}" for i in range(n))
    lanes = Lanes(tasks)
    assert max(lanes.places(None)) - min(lanes.places(None)) < 30
    for groups in (tuple((t,) for t in tasks), (tasks[::2], tasks[1::2])):
        places, bundles = lanes.places(groups), lanes.bundles(groups)
        assert sorted(i for b in bundles for i in b) == list(range(lanes.lines))
        assert all(0 < p < 84 for p in places)
        spans = [(min(places[i] for i in b), max(places[i] for i in b)) for b in bundles]
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(spans))
