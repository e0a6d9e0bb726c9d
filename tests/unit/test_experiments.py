"""Every table and figure: listed with its scales, runs on two small batches, and shows what it found."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from logs import make_log, two_task_grams
from reconmtl.cli import main
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import UnknownNameError
from reconmtl.paper import experiments, tables
from reconmtl.paper.controls import recon
from reconmtl.paper.published import TITLES, load
from reconmtl.paper.trainings import Setup, Sources
from reconmtl.problems.rooms_files import write_npy_folders

RUNS = Path(__file__).parents[2] / "results" / "paper"


def test_every_table_and_figure_is_an_entry() -> None:
    figures = {f"f{i}" for i in range(1, 12) if i != 2}  # Figure 2 is a drawing
    assert set(experiments.EXPERIMENTS) == {*TITLES, *figures, "controls", "curves", "curves-shared"}
    for entry in experiments.listed():
        scales = entry["scales"]
        assert isinstance(scales, list)
        assert "mini" in scales, entry["name"]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNameError, match="t1"):
        experiments.find("t17")
    assert main(["paper", "run"]) == 2
    assert "NAME" in capsys.readouterr().err
    assert main(["paper", "ls"]) == 0
    assert "Does it matter which layers are split?" in capsys.readouterr().out


@pytest.mark.parametrize("table", ("t1", "t2", "t3", "t4", "t5", "t13", "t15", "t16"))
def test_every_row_of_a_table_of_results_is_trained(table: str) -> None:
    printed = {r["method"] for r in load(table).dicts()}
    assert (
        printed == set(experiments.find(table).rows) if table != "t2" else printed < set(experiments.find(table).rows)
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: experiments share trainings."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_every_experiment_runs_on_two_small_batches(name: str, out: Path) -> None:
    setup = experiments.find(name).setup("mini", out, smoke=True)
    assert experiments.find(name).run(setup, (0,), lambda _: None) == []
    page = experiments.page(name, setup, (0,))
    assert page.startswith(f"## {name}: ")
    assert "Nothing is finished yet" not in page
    assert "|" in page
    if importlib.util.find_spec("matplotlib") is not None:
        pictures = experiments.draw(name, setup, (0,), out / "figures")
        assert [p.stem for p in pictures] == [f"mini-{name}", *(["mini-t12-layers"] if name == "t12" else [])]
        assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)


def test_showing_trains_nothing_and_writes_what_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["paper", "show", "t12", "t1", "f11", "controls", "--out", str(tmp_path / "none")]
    assert main([*words, "--to", str(tmp_path / "page.md"), "--figures", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8").count("Nothing is finished yet") == 4
    assert [f.name for f in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.slow
def test_a_figure_stands_on_the_page_under_its_place_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    setup = experiments.find("t7").setup("mini", RUNS)
    pictures = experiments.draw("t7", setup, (0, 1, 2), tmp_path / "figures")
    assert experiments.embedded("t7", pictures, tmp_path / "page.md").endswith("](figures/mini-t7.png)")


def test_showing_refuses_what_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "show", "t1", "t77", "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is a folder" in said and "t77" in said


def test_folders_of_data_sets_are_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["paper", "run", "t15", "--scale", "full", "--out", str(tmp_path / "out")]
    assert main([*words, "--root", "citscapes=x", "nyuv2", "celeba=a", "celeba=b"]) == 2
    said = capsys.readouterr().err
    assert "Nearest: 'cityscapes'" in said and "--root nyuv2:" in said and "--root celeba=b:" in said
    assert main(["paper", "run", "t2", "--root", "celeba=x", "--out", str(tmp_path / "out")]) == 2
    assert "--scale full" in capsys.readouterr().err
    write_npy_folders(tmp_path / "nyuv2", "nyuv2", counts={"train": 4, "val": 2}, size=(32, 64))
    assert main([*words, "--root", f"nyuv2={tmp_path / 'nyuv2'}"]) == 2
    assert "--root cityscapes=DIR" in capsys.readouterr().err  # before anything is trained on the other one
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*published are")
def test_layers_found_elsewhere_at_full_scale_come_from_the_files_of_the_other_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics")
    for name in ("cityscapes", "nyuv2"):
        write_npy_folders(tmp_path / name, name, counts={"train": 16, "val": 2}, size=(32, 64))
    sources = Sources(roots={name: tmp_path / name for name in ("cityscapes", "nyuv2")})
    setup = experiments.find("t15").setup("full", tmp_path / "out", smoke=True, sources=sources)
    assert setup.decided.options["root"] == str(tmp_path / "nyuv2")
    log = make_log(two_task_grams([[-0.5, 0.5]] * 4))
    asked = []

    def probe(there: Setup, _seed: int) -> ConflictLog:
        asked.append((there.decided.options["root"], there.folder.name))
        return log

    monkeypatch.setattr(Setup, "probe", probe)
    assert len(tables.found_in(experiments.CITYSCAPES)(setup, log, 0).layers) == len(log.layers)
    assert asked == [(str(tmp_path / "cityscapes"), "full-cityscapes-segnet-fast-dev-run")]


def test_wrong_seeds_and_folders_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["paper", "run", "t1", "--seeds", "-1", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.count("seeds = [-1]") == 1 and "is no folder" in said


def test_iterations_are_measured_without_the_data(tmp_path: Path) -> None:
    setup = experiments.find("f11").setup("full", tmp_path, smoke=True)
    assert setup.decided.options["width"] == 64
    assert "Nothing is finished yet" in experiments.page("f11", setup, (0,))


def test_every_finished_seed_is_shown(tmp_path: Path) -> None:
    setup = experiments.find("controls").setup("mini", tmp_path)
    for seed in (3, 100):
        shutil.copytree(RUNS / "mini-multifashion" / "joint" / "seed0", setup.folder / "joint" / f"seed{seed}")
    assert experiments.finished_seeds("controls", setup) == (3, 100)


@pytest.mark.slow
def test_layers_found_elsewhere_are_those_of_the_other_data_set(out: Path) -> None:
    here = experiments.NYUV2_SEGNET["mini"].setup("mini", out, smoke=True)
    there = experiments.CITYSCAPES["mini"].setup("mini", out, smoke=True)
    assert here.folder != there.folder
    log = here.probe(0)
    runs = experiments.find("t15").run(here, (0,), lambda _: None)
    assert runs == [] and "that were found on the other data set too: " in experiments.page("t15", here, (0,))
    plan = tables.found_in(experiments.CITYSCAPES)(here, log, 0)
    assert plan.tasks == log.tasks and len(plan.tasks) == 3
    assert set(plan.layers) == set(recon()(there, there.probe(0), 0).layers) != set(recon()(here, log, 0).layers)
