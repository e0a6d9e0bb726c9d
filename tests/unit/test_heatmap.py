"""What the heatmap shows, under which name, in which shade."""

import itertools
import math

import numpy as np
import pytest

from logs import make_log, two_task_grams
from reconmtl.reporting.heatmap import Heatmap, nice_top, packed, shade
from reconmtl.reporting.windows import Windows, ratio
from studies import conflict_log, material, network_names


def test_many_tasks_stand_in_camps_and_numbers_stay_with_their_names() -> None:
    tasks = [f"t{i}" for i in range(12)]
    log = conflict_log(tasks=tasks, layers=network_names(4), steps=40)
    heat = Heatmap.of(material(log), Windows.of(log, severity=-0.1))
    assert heat is not None and sorted(heat.tasks) == sorted(tasks)
    camps = [int(t[1:]) % 3 for t in heat.tasks]
    assert len(list(itertools.groupby(camps))) == 3  # each camp in one piece
    names = {frozenset(p): s for p, s in zip(log.pairs, log.pair_scores(severity=-0.1).sum(0).tolist(), strict=True)}
    assert [names[frozenset(p)] for p in heat.pairs] == heat.windows.pair_below.sum((0, 1)).tolist()
    matrix = heat.matrix()
    assert np.isnan(np.diag(matrix)).all() and np.array_equal(matrix, matrix.T, equal_nan=True)


def test_the_heatmap_says_which_layer_and_pair_conflict_most() -> None:
    cosines = [[-0.5, 0.5, -0.5]] * 6 + [[-0.5, 0.5, 0.5]] * 6
    log = make_log(two_task_grams(cosines))
    heat = Heatmap.of(material(log), Windows.of(log, severity=-0.1))
    assert heat is not None
    said = heat.conclusion().replace("\u00a0", " ")
    assert "most frequent at l0, 100.0 % of its pairs, and rarest at l1, 0.0 %" in said
    assert "they fade (66.7 % in its first third, 33.3 % in its last)" in said


def test_numbers_are_packed_small_and_come_back() -> None:
    import base64

    for top in (1, 255, 256, 65_535, 65_536):
        values = np.array([[0, top], [1, 2]])
        out = packed(values)
        size = int(str(out["bytes"]))
        raw = base64.b64decode(str(out["base64"]))
        assert np.frombuffer(raw, dtype=f"<u{size}").tolist() == values.reshape(-1).tolist()
        assert size == (1 if top < 256 else 2 if top < 65_536 else 4)
    assert packed(np.full((3, 4), 7)) == {"n": 12, "same": 7}


def test_shades_cover_the_scale_and_mark_what_is_missing() -> None:
    assert [shade(r, 0.9) for r in (0.0, 0.05, 0.15, 0.9)] == ["q0", "q0", "q1", "q8"]
    assert shade(math.nan, 1.0) == "none"
    assert nice_top(np.array([0.31])) == pytest.approx(0.4)
    assert nice_top(np.array([math.nan])) == 1.0 and nice_top(np.array([0.97])) == 1.0
    assert ratio([1, 2], [2, 0])[0] == 0.5 and math.isnan(ratio([1, 2], [2, 0])[1])
