"""Controls: how many layers, parameters and operations each has, on the network of the demonstration."""

from pathlib import Path

from reconmtl.paper import controls, prices
from reconmtl.paper.trainings import Setup


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
