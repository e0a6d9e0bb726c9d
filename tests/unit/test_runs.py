"""What a training leaves behind comes back as it was; every damaged file is named; nobody's folder is deleted."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reconmtl import runs
from reconmtl.checkpoints import read_checkpoint, save_checkpoint
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ReconError, RunError
from reconmtl.files import write_json
from reconmtl.plan import Plan
from reconmtl.runs import Run, describe, environment, new_folder

PLAN = Plan(tasks=["a", "b"], layers=["fc"], chosen={"by": "conflict", "k": 1})
CONFIG = {"problem": "p", "norm_stats": "per-task", "recipe": {"lr": 0.1}}


def make(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "method": "joint",
        "label": "joint w/ Recon",
        "seed": 3,
        "metrics": {"a": {"acc": 80.5, "f1": 1.0}, "b": {"mse": 0.25}, "c": {}},
        "directions": {"a": {"acc": "max", "f1": "max"}, "b": {"mse": "min"}, "c": {}},
        "parameters": 2**19,
        "seconds": 1.5,
        "fingerprint": "0123",
        "network": "Net",
        "config": CONFIG,
    }
    return Run(**{**values, **changes})


def write(folder: Path, run: Run) -> Path:
    write_json(folder / "config.json", run.config)
    if run.plan is not None:
        run.plan.save(folder / "plan.json")
    run.path = folder
    run.save()
    return folder


# Runs. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_run_comes_back_as_it_was(tmp_path: Path, full: bool) -> None:
    run = make()
    if full:
        run.plan = PLAN
        grams = torch.rand(4, 1, 3)
        run.log = ConflictLog(grams, tasks=["a", "b"], layers=["fc"], sizes={"fc": 6}, types={"fc": "Linear"})
    loaded = Run.load(write(tmp_path, run))
    assert loaded.to_dict() == run.to_dict() and loaded.metrics == run.metrics and loaded.config == run.config
    assert loaded.path == tmp_path and loaded.megabytes == 2
    if full:
        assert loaded.plan is not None and loaded.plan.to_dict() == PLAN.to_dict()
        assert loaded.log is not None and torch.equal(loaded.log.grams, grams)
    else:
        assert loaded.plan is None and loaded.log is None


def test_time_is_kept_beside_the_result(tmp_path: Path) -> None:
    assert Run.load(write(tmp_path, make())).seconds == 1.5
    assert "seconds" not in make().to_dict()
    (tmp_path / "timing.json").unlink()
    assert math.isnan(Run.load(tmp_path).seconds)
    for wrong in ("[]", '{"format": "reconmtl.timing/1"}', '{"format": "reconmtl.timing/1", "seconds": -1}'):
        (tmp_path / "timing.json").write_text(wrong)
        with pytest.raises(RunError, match=r"timing\.json: field 'seconds'"):
            Run.load(tmp_path)


def test_a_metric_without_a_value_does_not_lose_the_run(tmp_path: Path) -> None:
    metrics = {"a": {"acc": float("nan"), "f1": float("inf")}, "b": {"mse": -float("inf")}, "c": {}}
    loaded = Run.load(write(tmp_path, make(metrics=metrics))).metrics
    assert math.isnan(loaded["a"]["acc"]) and loaded["a"]["f1"] == math.inf and loaded["b"]["mse"] == -math.inf


def test_a_run_without_its_problem_says_how_to_get_the_network(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"open it with `reconmtl\.train\.open_run\(path, problem\)`"):
        Run.load(write(tmp_path, make())).model()
    model = nn.Linear(1, 1)
    assert make(build=lambda _: model).model() is model


@pytest.mark.parametrize(
    "field", ["method", "label", "seed", "metrics", "directions", "parameters", "fingerprint", "network"]
)
@pytest.mark.parametrize("damage", ["missing", "wrong"])
def test_a_damaged_field_is_named(tmp_path: Path, field: str, damage: str) -> None:
    data = make().to_dict()
    if damage == "missing":
        del data[field]
    else:
        data[field] = [1]
    write(tmp_path, make())
    write_json(tmp_path / "result.json", data)
    with pytest.raises(RunError, match=rf"result\.json: missing or wrong fields: {field}\."):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("result.json", None, r"There is no file .*result\.json"),
        ("result.json", "{", r"result\.json cannot be read as JSON"),
        ("result.json", "[]", r"result\.json: field 'format' should be 'reconmtl\.run/1'"),
        ("result.json", '{"format": "reconmtl.run/2"}', "field 'format' should be"),
        ("result.json", {"metrics": {"a": 3}}, "'metrics' and 'directions' should map a task to its metrics"),
        ("result.json", {"metrics": {"a": {"acc": "high"}}}, "should map a task to its metrics"),
        ("result.json", {"metrics": {"a": {"acc": None}}}, "should map a task to its metrics"),
        ("result.json", {"metrics": {"a": {"acc": 1}}}, "should name the same tasks and metrics"),
        ("result.json", {"directions": {"a": {"acc": "up"}}}, "'directions' should hold 'max' or 'min'"),
        ("config.json", None, r"There is no file .*config\.json"),
        ("config.json", "[]", r"config\.json: expected an object, found list"),
        ("plan.json", "{}", r"plan\.json"),
        ("log/log.json", "{}", r"log\.json: field 'format'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: object, complaint: str) -> None:
    write(tmp_path, make(plan=PLAN))
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        write_json(path, json.loads(path.read_text()) | content)
    with pytest.raises(ReconError, match=complaint):
        Run.load(tmp_path)


# Folders. -------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_a_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    for path in (tmp_path / "deep" / "new", tmp_path / "deep" / "new"):
        assert new_folder(path) == path and path.is_dir()
    assert new_folder(str(tmp_path / "other"), overwrite=True).is_dir()
    assert new_folder(tmp_path / "third", resume=True).is_dir()


def test_an_existing_folder_of_ours_is_continued_or_replaced_on_request_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", make())
    before = contents(folder)
    with pytest.raises(RunError, match=r"out exists already\. Continue it with --resume, replace it with --overwrite"):
        new_folder(folder)
    with pytest.raises(RunError, match="give one of them"):
        new_folder(folder, resume=True, overwrite=True)
    assert new_folder(folder, resume=True) == folder and contents(folder) == before
    assert new_folder(folder, overwrite=True) == folder and contents(folder) == set()


@pytest.mark.parametrize("foreign", [None, {"model_type": "bert"}, [], "{"], ids=["none", "bert", "list", "damaged"])
@pytest.mark.parametrize("option", ["resume", "overwrite", None])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, foreign: object, option: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if foreign is not None:
        (tmp_path / "config.json").write_text(foreign if isinstance(foreign, str) else json.dumps(foreign))
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"exists already and does not hold results of reconmtl.*--out"):
        new_folder(tmp_path, **({option: True} if option else {}))
    assert contents(tmp_path) == before


def test_what_is_no_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file; give a folder"):
        new_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(RunError, match=r"Cannot make the folder .*below: Not a directory"):
        new_folder(tmp_path / "file" / "below")


def test_a_link_to_a_folder_of_ours_is_not_followed_to_delete_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "real", make())
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(RunError, match=r"Cannot make the folder .*symbolic link"):
        new_folder(tmp_path / "link", overwrite=True)
    assert (folder / "result.json").exists()


# The rest. ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.add_module("tied", model[0])
    save_checkpoint(tmp_path / "last.ckpt", model, {"label": "joint"})
    loaded = read_checkpoint(tmp_path / "last.ckpt").model
    state = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04os.system"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "last.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"last\.ckpt cannot be read as a checkpoint: "):
        read_checkpoint(path)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_environment_names_our_commit_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"] and found["packages"]["reconmtl"] and found["threads"] >= 1
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    package = tmp_path / ".venv" / "reconmtl"  # installed inside somebody else's repository
    package.mkdir(parents=True)
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    assert environment()["git"] is None


LABELS: list[tuple[Callable[[], Plan | None], str, str]] = [
    (lambda: None, "single", "single-task"),
    (lambda: None, "joint", "joint"),
    (lambda: PLAN, "joint", "joint w/ Recon"),
    (
        lambda: Plan(tasks=["a", "b"], layers=["x", "y"], chosen={"by": "smallest"}),
        "joint",
        "joint w/ 2 smallest layers",
    ),
    (lambda: Plan(tasks=["a", "b"], layers=["x"]), "joint", "joint w/ 1 layer split"),
    (
        lambda: Plan(tasks=["a", "b"], layers=["x"], chosen={"by": "random_layers"}),
        "joint",
        "joint w/ 1 random layer",
    ),
]


@pytest.mark.parametrize(("plan", "method", "label"), LABELS)
def test_methods_are_called_as_in_the_paper(plan: Callable[[], Plan | None], method: str, label: str) -> None:
    assert describe(method, plan()) == label
