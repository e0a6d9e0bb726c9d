"""Trainings of experiments: what is finished is read, what is missing is done, what cannot be done is named."""

from pathlib import Path

import pytest

from reconmtl.errors import ReconError, UnknownNameError
from reconmtl.evaluation import Machine
from reconmtl.paper import controls, prices
from reconmtl.paper.trainings import Setup, Sources, Training, run_all, taking


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


def test_a_smoke_test_is_never_taken_for_the_training_itself(setup: Setup) -> None:
    real = Setup.of("planted", "mini", setup.folder.parent)
    joint = Training(name="joint")
    run_all(setup, (joint,), (0,), lambda _: None)
    assert joint.finished(setup, 0) is not None and joint.finished(real, 0) is None
    assert setup.folder.name == "mini-planted-fast-dev-run"


def test_data_that_is_missing_is_asked_for_by_name_and_stood_in_for_where_results_are_only_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path / "empty"))
    assert taking("root") == ["pascal_context", "celeba", "cityscapes", "nyuv2"]
    for problem in taking("root"):
        with pytest.raises(ReconError, match=f"--root {problem}=DIR"):
            Setup.of(problem, "full", tmp_path)
    with pytest.raises(ReconError, match="reconmtl data multifashion"):
        Setup.of("multifashion", "full", tmp_path)
    shown = Setup.of("multifashion", "full", tmp_path, showing=True)
    assert shown.decided.options["data"] == "full" and shown.decided.epochs == 120  # as it was trained
    with pytest.raises(ReconError, match="--root cityscapes=DIR"):
        Setup.of("cityscapes", "full", tmp_path, showing=True)
    weights = Sources(weights={"celeba": tmp_path / "resnet18.pth"})
    assert Setup.of("celeba", "mini", tmp_path, sources=weights).folder.name == "mini-celeba"  # of the full scale only


def test_what_is_shown_without_the_data_is_what_was_trained_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path / "empty"))
    trained = Setup.of("multifashion", "full", tmp_path, smoke=True)  # on the mini set, as every smoke test
    log = trained.probe(0)
    shown = Setup.of("multifashion", "full", tmp_path, smoke=True, showing=True)
    assert shown.folder == trained.folder and shown.probe(0).grams.equal(log.grams)
    priced = Setup.of("multifashion", "full", tmp_path, showing=True)
    assert prices.network_cost(priced).megabytes == pytest.approx(42.8145, abs=1e-4)
