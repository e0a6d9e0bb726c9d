"""Trainings of experiments: what is finished is read, what is missing is done, what cannot be done is named."""

from pathlib import Path

import pytest

from reconmtl.errors import UnknownNameError
from reconmtl.evaluation import Machine
from reconmtl.paper import controls
from reconmtl.paper.trainings import Setup, Training, run_all


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup.of("planted", "mini", tmp_path_factory.mktemp("paper"), smoke=True)


def test_a_finished_training_is_read_and_one_that_cannot_be_is_named(setup: Setup) -> None:
    unknown = Training(name="x", balancer="no-such")
    of = (Training(name="joint"), Training(name="recon", choose=controls.recon()), unknown)
    said: list[str] = []
    lacking = run_all(setup, of, (0,), said.append)
    assert [(n, s) for n, s, _ in lacking] == [("x (no-such)", 0)] and "no-such" in lacking[0][2]
    assert len(said) == 3
    run_all(setup, of, (0,), said.append)
    assert len(said) == 4  # only what is missing is said again
    assert not list(setup.folder.glob("*/seed0/last.ckpt"))
    page = controls.show(setup, of, (0, 1))
    assert "| recon" in page and "added MB" in page


def test_a_problem_without_that_scale_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="no scale"):
        Setup.of("scenes", "full", Path("nowhere"))


def test_a_smoke_test_takes_few_tasks_and_another_precision_has_a_folder_of_its_own(tmp_path: Path) -> None:
    setup = Setup.of("celeba", "mini", tmp_path, smoke=True)
    assert len(setup.decided.tasks) == 4 == len(setup.problem().task_names)
    other = Setup.of("planted", "mini", tmp_path, where=Machine(precision="bf16-mixed"))
    assert other.machine().precision == "bf16-mixed" and other.folder.name == "mini-planted-bf16-mixed"
    assert Setup.of("planted", "mini", tmp_path, where=Machine(precision="32")).folder.name == "mini-planted"
