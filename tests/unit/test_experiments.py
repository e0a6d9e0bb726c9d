"""Every table and figure: listed with its scales, runs on two small batches, and shows what it found."""

from pathlib import Path

import pytest

from reconmtl.cli import main
from reconmtl.errors import UnknownNameError
from reconmtl.paper import controls, experiments
from reconmtl.paper.published import TITLES
from reconmtl.paper.trainings import Setup, Training, run_all


def test_every_table_and_figure_is_an_entry() -> None:
    figures = {f"f{i}" for i in range(1, 12) if i != 2}  # Figure 2 is a drawing
    assert set(experiments.EXPERIMENTS) == {*TITLES, *figures, "controls", "curves"}
    for entry in experiments.listed():
        scales = entry["scales"]
        assert isinstance(scales, list)
        assert "mini" in scales, entry["name"]


def test_unknown_names_and_scales_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNameError, match="t1"):
        experiments.find("t17")
    with pytest.raises(UnknownNameError, match="no scale"):
        Setup.of("scenes", "full", Path("nowhere"))
    assert main(["paper", "run"]) == 2
    assert "NAME" in capsys.readouterr().err
    assert main(["paper", "ls"]) == 0
    assert "Does it matter which layers are split?" in capsys.readouterr().out


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup.of("planted", "mini", tmp_path_factory.mktemp("paper"), smoke=True)


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
    split = controls.network_cost(setup, plan=recon)
    for measure in (controls.parameters, controls.operations):
        width = controls.as_wide_as(measure)(setup, log)
        wider, narrower = (measure(controls.network_cost(setup, width=w)) for w in (width, width - 1))
        assert narrower < measure(split) <= wider


def test_a_finished_training_is_read_and_one_that_cannot_be_is_named(setup: Setup) -> None:
    of = (Training(name="joint"), Training(name="recon", choose=controls.recon()), Training(name="x", lacks="no x yet"))
    said: list[str] = []
    lacking = run_all(setup, of, (0,), said.append)
    assert [(n, s) for n, s, _ in lacking] == [("x", 0)] and "no x yet" in lacking[0][2]
    assert len(said) == 3
    run_all(setup, of, (0,), said.append)
    assert len(said) == 4  # only what is missing is said again
    assert not list(setup.folder.glob("*/seed0/last.ckpt"))
    page = controls.show(setup, of, (0, 1))
    assert "| recon" in page and "added MB" in page


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: experiments share trainings."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_every_experiment_runs_on_two_small_batches(name: str, out: Path) -> None:
    setup = experiments.find(name).setup("mini", out, smoke=True)
    lacking = experiments.find(name).run(setup, (0,), lambda _: None)
    assert all("balancer" in why or "a training of its own" in why for _, _, why in lacking), lacking
    page = experiments.page(name, setup, (0,))
    assert page.startswith(f"## {name}: ")
    assert "Nothing is finished yet" not in page
    assert "|" in page
