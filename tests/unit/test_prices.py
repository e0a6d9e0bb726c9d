"""What choices gain and cost: gains over joint training and differences to Recon are over common seeds."""

from pathlib import Path

import pytest

from reconmtl.paper import controls, prices
from reconmtl.paper.trainings import Setup, Training
from reconmtl.runs import Run
from reconmtl.splitting.costs import Cost
from studies import accuracies


def test_gains_and_differences_are_over_the_same_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    per_task, shared = (
        Training(name="recon", choose=controls.random_layers),
        Training(name="recon", choose=controls.random_layers, norm_stats="shared"),
    )
    few = Training(name="few", choose=controls.random_layers)
    mixed = Training(name="few", choose=controls.random_layers, norm_stats="shared")
    values = {
        "joint": {0: 40.0, 1: 60.0},  # 50 on average: a point is 2 percent
        per_task.row: {0: 45.0, 1: 67.0},
        shared.row: {0: 44.0},
        few.row: {0: 43.0},
        mixed.row: {0: 42.0},
    }

    def one(training: Training, _setup: Setup, seed: int) -> Run | None:
        return {run.seed: run for run in accuracies(training.row, values[training.row])}.get(seed)

    monkeypatch.setattr(Training, "finished", one)
    monkeypatch.setattr(prices, "costs", lambda *_: Cost(1000, 1.0, 100, None))
    setup = Setup.of("planted", "mini", tmp_path)
    _, found = prices.priced(setup, (per_task, shared, few, mixed), (0, 1))
    rows = {p.row.label: p for p in found}
    assert rows["joint"].gain.mean == pytest.approx(0) and rows["joint"].paired is not None
    assert rows[per_task.row].gain.mean == pytest.approx(12) and rows[per_task.row].paired is None
    assert rows[few.row].gain.mean == pytest.approx(6)  # three points over the joint training of its seed, not -14
    differences = {p.row.label: p.paired.mean for p in found if p.paired is not None}
    assert differences == pytest.approx({"joint": -12, shared.row: -2, few.row: -4, mixed.row: -4})
