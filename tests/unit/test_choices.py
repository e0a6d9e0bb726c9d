"""Settings, presets and problems become one set of values; every fault of them is named, all at once."""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from reconmtl.choices import Decided, decide, default_folder, find_problem, load_problem
from reconmtl.errors import ProblemError, ReconError, UnknownNameError
from reconmtl.problems import READY, multifashion, planted
from reconmtl.problems.multifashion_data import load_mini
from reconmtl.settings import Settings

OWN = '''
"""A problem of the user's own, beside a module of their own."""
from dataclasses import dataclass

from reconmtl import Problem
from reconmtl.problems import planted
import {sibling}

PRESETS = {presets}
COUNT = []


@dataclass
class Choice:  # needs its module in sys.modules
    width: int = {sibling}.WIDTH


def make_it(width: int = 4) -> Problem:
    COUNT.append(Choice(width))
    problem = planted.make()
    recipe = problem.recipe.override(epochs=20, milestones=(10, 15), batch_size=16, lr=0.5)
    return problem.replace(name=f"own-{{width}}", recipe=recipe)


def make_nothing() -> int:
    return 3


def make_broken() -> Problem:
    raise TypeError("a bug of the user's")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    sibling = f"sibling_{tmp_path.name}"  # pytest keeps modules: each test has its own
    (tmp_path / f"{sibling}.py").write_text("WIDTH = 7\n")
    for name, presets in (("own.py", "{}"), ("random.py", "{}"), (f"module_{tmp_path.name}.py", "{}")):
        (tmp_path / name).write_text(OWN.format(sibling=sibling, presets=presets))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("sibling_", "module_", "reconmtl_problem_")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that these tests may count on, whatever suits the planted problem."""
    monkeypatch.setitem(planted.PRESETS, "default", replace(planted.PRESETS["default"], epochs=8, probe_epochs=2))


def settled(problem: str = "planted", **given: Any) -> Decided:
    return decide(Settings(problem=problem, accelerator="cpu", **given))


def faults(problem: str = "planted", **given: Any) -> list[str]:
    with pytest.raises(ReconError) as caught:
        settled(problem, **given)
    return str(caught.value).split("\n")


# Values. --------------------------------------------------------------------------------------------------------------


def test_a_preset_fills_in_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multifashion, "load_full", load_mini)
    paper = settled("multifashion", preset="paper")
    assert (paper.epochs, paper.milestones, paper.batch_size, paper.lr) == (120, (60, 90), 256, 0.1)
    assert (paper.probe_epochs, paper.severity, paper.k, paper.seeds) == (30, -0.1, 25, (0, 1, 2))
    assert paper.options == {"width": 64, "data": "full"} and paper.tasks == ("digit", "fashion")
    assert paper.note == multifashion.PRESETS["paper"].note and paper.max_batches is None
    assert settled("multifashion").preset == "demo"  # the first one


def test_what_is_given_wins_over_the_preset() -> None:
    given: dict[str, Any] = {
        "tasks": ("minus", "plus"),
        "methods": ("joint", "recon", "joint"),
        "seeds": (7,),
        "batch_size": 8,
        "lr": 0.0,
        "probe_epochs": 1,
        "severity": 0.0,
        "k": 3,
        "record": 0,
        "norm_stats": "shared",
    }
    found = asdict(settled(**given))
    assert {n: found[n] for n in given} == given | {"methods": ("joint", "recon")}
    problem = load_problem(settled(**given))
    assert problem.task_names == ("minus", "plus") and (problem.recipe.batch_size, problem.recipe.lr) == (8, 0.0)


def test_the_largest_seed_can_be_given() -> None:
    assert settled(seeds=(0, 2**32 - 1)).seeds == (0, 2**32 - 1)


def test_the_note_of_a_preset_is_printed_only_while_it_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multifashion, "load_full", load_mini)

    def note(**given: Any) -> str:
        return settled("multifashion", preset="paper", **given).note

    true = multifashion.PRESETS["paper"].note
    assert note() == true
    same: dict[str, Any] = {"data": "full", "width": 64, "epochs": 120, "seeds": (7, 8, 9), "methods": ("joint",)}
    assert note(**same, record=0, norm_stats="shared") == true  # nothing that it speaks of
    assert note(width=4, epochs=1) == (
        "The preset paper with other settings: width = 4 instead of 64, epochs = 1 instead of 120, "
        "probe_epochs = 1 instead of 30."
    )
    others: dict[str, Any] = {"data": "mini", "batch_size": 64, "lr": 0.2, "severity": 0.0, "k": 3, "probe_epochs": 2}
    for name, value in others.items():
        assert f": {name} = {value} instead of " in note(**{name: value})
    assert note(seeds=(0,)).endswith(": number of seeds = 1 instead of 3.")


@pytest.mark.parametrize(
    ("problem", "preset", "folder"),
    [
        ("multifashion", "demo", "runs/multifashion-demo"),
        ("some/where/mine.py:make_it", None, "runs/mine-make_it"),
        ("some/where/mine.py:other", "quick", "runs/mine-other-quick"),
        ("package.module:make", None, "runs/package.module-make"),
    ],
)
def test_every_problem_has_a_folder_of_its_own(problem: str, preset: str | None, folder: str) -> None:
    assert default_folder(replace(settled(), problem=problem, preset=preset)) == Path(folder)


@pytest.mark.parametrize(
    ("epochs", "milestones", "probed"),
    [(None, (4, 6), 2), (8, (4, 6), 2), (100, (50, 75), 25), (6, (3, 4), 2), (2, (1, 2), 1), (1, (1,), 1)],
)
def test_another_length_keeps_the_fractions_of_the_schedule(
    epochs: int | None, milestones: tuple[int, ...], probed: int
) -> None:
    found = settled(epochs=epochs)
    assert (found.epochs, found.milestones, found.probe_epochs) == (epochs or 8, milestones, probed)
    assert load_problem(found).recipe.milestones == milestones


def test_a_smoke_test_is_one_epoch_of_two_batches_with_one_seed() -> None:
    found = settled(fast_dev_run=True, seeds=(4, 5), epochs=50)
    assert (found.epochs, found.milestones, found.probe_epochs, found.seeds, found.max_batches) == (1, (), 1, (4,), 2)
    assert "mean nothing" in found.note
    assert found.batch_size == settled().batch_size <= 32
    assert settled("multifashion", preset="demo", fast_dev_run=True).batch_size == 32


def test_a_smoke_test_of_the_full_set_takes_the_mini_set_where_it_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path))
    found = settled("multifashion", preset="paper", fast_dev_run=True)
    assert found.options == {"width": 64, "data": "mini"} and "takes the mini set instead" in capsys.readouterr().err
    assert multifashion.PRESETS["paper"].options["data"] == "full"
    for given in ({"fast_dev_run": True, "data": "full"}, {}):
        assert "--from DIR" in "\n".join(faults("multifashion", preset="paper", **given))


def test_what_is_decided_is_plain_data() -> None:
    assert json.loads(json.dumps(asdict(settled())))["milestones"] == [4, 6]


# Faults. --------------------------------------------------------------------------------------------------------------


def test_every_fault_is_reported_at_once() -> None:
    found = faults(
        preset="defualt",
        tasks=("plux",),
        methods=("recn", "joint"),
        severity=-1.0,
        k=0,
        seeds=(1, 1),
        record=-1,
        jobs=0,
        precision="31-true",
        epochs=0,
        batch_size=0,
        lr=-1.0,
    )
    expected = [
        "Unknown preset 'defualt' of planted. Nearest: 'default'.",
        "Unknown method 'recn'. Nearest: 'recon'.",
        "Severity S = -1.0 is outside (-1, 0]",
        "K = 0: expected at least 1 layer.",
        "jobs = 0: expected at least 1.",
        "record = -1: expected 0 (nothing) or m (one of m steps).",
        "seeds = [1, 1]: expected different whole numbers from 0 to 2**32 - 1, at least one.",
        "precision = '31-true'",
        "Unknown task 'plux'. Nearest: 'plus'.",
        "tasks = ['plux']: conflicts need at least two tasks.",
        "This recipe cannot be trained: epochs = 0: expected a whole number of at least 1; batch_size = 0",
    ]
    assert len(found) == len(expected)
    for line, piece in zip(found, expected, strict=True):
        assert piece in line


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"severity": 0.1}, "outside (-1, 0]"),
        ({"severity": float("nan")}, "outside (-1, 0]"),
        ({"methods": ()}, "methods: give at least one"),
        ({"seeds": ()}, "seeds = []"),
        ({"seeds": (0, -1)}, "seeds = [0, -1]: expected different whole numbers from 0 to 2**32 - 1"),
        ({"seeds": (2**32,)}, "seeds = [4294967296]"),
        ({"seeds": (True,)}, "seeds = [True]"),
        ({"seeds": (0.5,)}, "seeds = [0.5]"),
        ({"tasks": ()}, "tasks = []: conflicts need at least two"),
        ({"tasks": ("plus", "plus")}, "'plus' appears more than once"),
        ({"probe_epochs": 9}, "probe_epochs = 9: expected 1 to 8"),
        ({"probe_epochs": 0}, "probe_epochs = 0: expected 1 to 8"),
        ({"batch_size": 513}, "512 samples are fewer than one batch of 513"),
        ({"width": 3}, "planted does not take these options {'width': 3}: got an unexpected keyword argument 'width'"),
    ],
)
def test_a_fault_is_named(given: dict[str, Any], complaint: str) -> None:
    assert complaint in "\n".join(faults(**given))


def test_a_width_and_data_that_do_not_exist_are_named_together() -> None:
    found = "\n".join(faults("multifashion", width=0, data="minni", methods=("jont",)))
    for part in ("width = 0: expected at least 1", "Nearest: 'mini'", "Unknown method 'jont'. Nearest: 'joint'"):
        assert part in found


# Problems. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READY)
def test_ready_problems_have_a_factory_and_presets(name: str) -> None:
    make, presets = find_problem(name)
    assert callable(make) and presets


@pytest.mark.parametrize("form", ["{}/own.py:make_it", "module_{}:make_it"])
def test_a_problem_of_ones_own_is_found_in_a_file_or_a_module(
    folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    spec = form.format(folder if "/" in form else folder.name)
    found = settled(spec, width=9)
    assert (found.epochs, found.milestones, found.probe_epochs, found.preset) == (20, (10, 15), 5, None)
    assert (found.batch_size, found.lr, found.k, found.severity, found.seeds) == (16, 0.5, None, -0.1, (0,))
    assert load_problem(found).name == "own-9"
    assert settled(spec, epochs=4).milestones == (2, 3)


def test_a_file_that_is_called_like_a_module_does_not_replace_it(folder: Path) -> None:
    make, _ = find_problem(f"{folder}/random.py:make_it")
    assert make().name == "own-4"
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("plantd", r"Unknown problem 'plantd'\. Nearest: 'planted'\. Your own is file\.py:function"),
        ("{}/own.py", r"Unknown problem '.*own\.py'"),
        ("{}/own.py:mak_it", r"own\.py has no function 'mak_it'\. Nearest: 'make_it'"),
        ("{}/own.py:zzz", r"Known: 'Choice', 'make_it', 'make_nothing', 'make_broken'\."),
        ("{}/none.py:make", r"There is no file .*none\.py, named by problem"),
        ("no.such.module:make", r"Cannot import 'no\.such\.module' of problem .*: No module named 'no'"),
        (":make", "Cannot import ''"),
        (".relative:make", r"Cannot import '\.relative'"),
    ],
)
def test_a_problem_that_does_not_exist_is_answered_with_the_nearest(folder: Path, spec: str, complaint: str) -> None:
    with pytest.raises(UnknownNameError, match=complaint):
        settled(spec.format(folder))


def test_a_factory_that_makes_no_problem_is_named_and_a_bug_in_it_is_not_hidden(folder: Path) -> None:
    with pytest.raises(ProblemError, match=r"own\.py:make_nothing should return a reconmtl\.Problem, returned int"):
        settled(f"{folder}/own.py:make_nothing")
    with pytest.raises(TypeError, match="a bug of the user's"):
        settled(f"{folder}/own.py:make_broken")


def test_presets_of_ones_own_are_found(folder: Path) -> None:
    presets = "{'quick': __import__('dataclasses').replace(planted.PRESETS['default'], epochs=40, probe_epochs=4, k=1)}"
    (folder / "own.py").write_text(OWN.format(sibling=f"sibling_{folder.name}", presets=presets))
    found = settled(f"{folder}/own.py:make_it")
    assert (found.preset, found.epochs, found.milestones, found.probe_epochs, found.k) == ("quick", 40, (20, 30), 4, 1)
    assert settled(f"{folder}/own.py:make_it", epochs=25).probe_epochs == 3  # a tenth, rounded up
