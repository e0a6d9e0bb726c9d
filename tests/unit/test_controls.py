"""Controls: how many layers, parameters and operations each has, on the network of the demonstration."""

from pathlib import Path

import pytest

from reconmtl.paper import controls, prices, selections
from reconmtl.paper.trainings import Setup, Training
from reconmtl.runs import Run
from reconmtl.splitting.costs import Cost


def test_every_way_to_split_stands_at_both_settings_of_the_statistics() -> None:
    found = {(t.name, t.norm_stats) for t in controls.CENTRAL if t.choose is not None}
    assert found == {(way, stats) for way in controls.WAYS for stats in ("per-task", "shared")}
    named = {t.name for of in (controls.CENTRAL, controls.TABLE_7, controls.TABLE_11) for t in of}
    assert controls.MEANINGS.keys() <= named  # or a row was renamed
    rest = {t.name for t in controls.CENTRAL if t.choose is None}
    assert rest == {"joint", "single", "wider, operations", "wider, parameters"}


def test_controls_cost_what_they_say(tmp_path: Path) -> None:
    setup = Setup.of("multifashion", "mini", tmp_path, smoke=True)
    log = setup.probe(0)
    recon = controls.WAYS["recon"](setup, log, 0)
    budget = sum(log.sizes[n] for n in recon.layers)
    assert len(recon.layers) == 25
    assert sum(log.sizes[n] for n in controls.random_parameters(exceed=False)(setup, log, 0).layers) <= budget
    assert sum(log.sizes[n] for n in controls.random_parameters(exceed=True)(setup, log, 0).layers) > budget
    assert len(controls.random_layers(setup, log, 0).layers) == len(controls.smallest(setup, log, 0).layers) == 25
    both = set(controls.least_conflicts(setup, log, 0).layers) & set(recon.layers)
    assert len(both) == 2 * 25 - len(log.layers)  # as few as can be
    first, others = log.layers[0], set(recon.layers) - {log.layers[0]}
    assert controls.first_alone(setup, log, 0).layers == {first: (("digit",), ("fashion",))}
    but = controls.recon_but_first(setup, log, 0).layers
    assert len(but) == 25 and first not in but and others < set(but)
    for seed in range(4):
        chosen, drawn = (
            controls.random_and_first(setup, log, seed).layers,
            controls.random_layers(setup, log, seed).layers,
        )
        assert len(chosen) == 25 and first in chosen and len(set(chosen) - set(drawn)) <= 1
    split = prices.network_cost(setup, plan=recon)
    for measure in (prices.parameters, prices.operations):
        width = controls.as_wide_as(measure)(setup, log)
        wider, narrower = (measure(prices.network_cost(setup, width=w)) for w in (width, width - 1))
        assert narrower < measure(split) <= wider


def finished(label: str, values: dict[int, float]) -> list[Run]:
    return [
        Run(
            method="joint",
            label=label,
            seed=seed,
            metrics={"digit": {"acc": value}, "fashion": {"acc": value}},
            directions={"digit": {"acc": "max"}, "fashion": {"acc": "max"}},
            parameters=1000,
            seconds=1.0,
            fingerprint="f",
            network="Net",
        )
        for seed, value in values.items()
    ]


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
        return {run.seed: run for run in finished(training.row, values[training.row])}.get(seed)

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
    drops = selections.drops(found, {"table": "t7", "Recon": shared.row, "RSL": mixed.row, "RSP": per_task.row})
    assert [(d.mean, d.n) for _, _, _, d, _ in drops] == [(2, 1), (2, 1), (-1, 1), (-1, 1)]
