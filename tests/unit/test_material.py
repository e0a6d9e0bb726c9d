"""Folders and runs become what a report is about; damage is named."""

import dataclasses
import json
from pathlib import Path

import pytest

from reconmtl.errors import RunError
from reconmtl.reporting.material import gather
from reconmtl.reporting.page import page
from reconmtl.reporting.stability import Stability
from reconmtl.reporting.windows import Windows
from reconmtl.runs import Run
from studies import conflict_log, network_names, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), tasks=["seg", "depth", "edges"], layers=network_names(12))


LINES = {
    "{": "line 2 is not JSON",
    "[]": "line 2: expected an object with the fields 'epoch' and 'test'",
    '{"epoch": 1, "test": 3}': "line 2: field 'test' should map",
    '{"epoch": 1, "test": {"a": {"acc": null}}}': "line 2: field 'test' should map",
    '{"epoch": "x", "test": {}}': "line 2: field 'epoch' should be a whole number",
    f'{{"epoch": {10**400}, "test": {{}}}}': "line 2: field 'epoch' should be a whole number",
    '{"test": {"a": {"acc": 1}}}': "line 2: field 'epoch' should be a whole number",
}


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_curve_is_named_with_its_line_and_field_and_leaves_the_numbers(tmp_path: Path, line: str) -> None:
    folder = write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(4), seeds=(0, 1))
    whole = gather(folder)
    (folder / "joint" / "seed0" / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n' + line + "\n")
    found = gather(folder)
    (out,) = found.left_out
    assert out.damaged and out.run == str(folder / "joint" / "seed0")
    assert f"metrics.jsonl, {LINES[line]}" in out.reason and "Its numbers are in the tables" in out.reason
    assert str(found.comparison) == str(whole.comparison)
    kept = [c for r, c in zip(whole.runs, whole.curves, strict=True) if r.path != folder / "joint" / "seed0"]
    assert [c for c in found.curves if c] == kept and len(kept) == 7


DAMAGED = {
    "joint/seed1/result.json": "joint/seed1",
    "joint/seed1/config.json": "joint/seed1",
    "joint/seed1/timing.json": "joint/seed1",
    "recon/seed0/plan.json": "recon/seed0",
    "recon/seed0/log/log.json": "recon/seed0",
    "joint/seed1/metrics.jsonl": "joint/seed1",
    "log/log.json": "log",
    "plan.json": ".",
    "config.json": ".",
    "env.json": ".",
}


@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
def test_one_damaged_file_of_a_study_stops_nothing_else_and_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(4), seeds=(0, 1))
    (folder / file).write_text(content)
    if (file, content) in (("joint/seed1/metrics.jsonl", ""), ("env.json", "[]"), ("config.json", "[]")):
        return  # no line of a curve, no fact, or no study: nothing that is wrong
    found = gather(folder)
    outs = [o for o in found.left_out if o.run == str(folder / DAMAGED[file])]
    assert len(outs) == 1 and outs[0].damaged and str(folder / file) in outs[0].reason
    assert {o.run for o in found.left_out} == {outs[0].run}
    lost = file.startswith(("joint/", "recon/")) and not file.endswith(".jsonl")
    assert len(found.runs) == 8 - lost and found.comparison is not None
    assert page(found, None)
    if lost:
        assert outs[0] in found.comparison.left_out and "--resume to train it again" in outs[0].reason


def test_a_run_without_its_config_is_seen(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(4), seeds=(0, 1))
    (folder / "joint" / "seed0" / "config.json").unlink()
    (folder / "joint" / "seed1" / "config.json").write_text("{")
    (folder / "joint" / "seed1" / "result.json").unlink()
    assert [Path(o.run).name for o in gather(folder).left_out] == ["seed0", "seed1"]


def test_where_nothing_is_left_everything_damaged_is_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(4), seeds=(0,))
    for file in [*folder.rglob("result.json"), folder / "log" / "log.json"]:
        file.write_text("{")
    with pytest.raises(RunError) as error:
        gather(folder)
    for name in ("single", "joint", "recon", "random"):
        assert str(folder / name / "seed0" / "result.json") in str(error.value)
    assert str(folder / "log" / "log.json") in str(error.value)
    other = write_study(tmp_path / "o", tasks=["a", "b"], layers=network_names(4), seeds=(0,))
    assert len(gather([folder, other]).runs) == 4  # beside what can be read it stops nothing


def test_folders_of_methods_and_runs_find_their_study(study: Path) -> None:
    whole = gather(study)
    assert [r.label for r in whole.runs] == [
        label for label in ("single-task", "joint", "joint w/ Recon", "joint w/ 4 random layers") for _ in (0, 1)
    ]
    for items in ([study / "joint"], [study / "joint" / "seed1"], [Run.load(study / "joint" / "seed1")]):
        found = gather(items)
        assert {r.label for r in found.runs} == {"joint"} and found.study is not None
        assert found.plan is not None and found.command == f"reconmtl run made.py:up --epochs 6 --out {study}"
        assert found.log is not None and found.log.steps == 64  # the probe's, not the run's own
    assert "the record of joint, seed 0" in gather(_without_log(study)).log_source
    (study / "joint" / "seed9").mkdir()
    (study / "joint" / "seed9" / "config.json").write_text('{"seed": 9, "method": "joint"}')
    comparison = gather(study).comparison
    assert comparison is not None and [Path(out.run).name for out in comparison.left_out] == ["seed9"]


def _without_log(study: Path) -> list[Run]:
    return [dataclasses.replace(r, path=None) for r in gather(study).runs]


def test_a_probe_of_several_seeds_is_ranked_as_one_and_compared_seed_by_seed(tmp_path: Path) -> None:
    names = network_names(6)
    logs = [conflict_log(tasks=["a", "b"], layers=names, steps=20, seed=s) for s in (0, 1)]
    for seed, log in enumerate(logs):
        log.save(tmp_path / "p" / f"seed{seed}" / "log")
    logs[0].merge(logs[1:]).save(tmp_path / "p" / "log")
    for kind in ("reconmtl.study/1", "reconmtl.config/1"):
        config = {"format": kind, "problem": "mine.py:make", "command": "probe"}
        (tmp_path / "p" / "config.json").write_text(json.dumps(config))
        found = gather(tmp_path / "p")
        assert found.log is not None and found.log.steps == 40 and found.problem == "mine.py:make"
        assert [name for name, _ in found.recordings] == ["the probe of seed0", "the probe of seed1"]
        stable = Stability.of(found, Windows.of(found.log, severity=-0.1))
        assert stable is not None
        ranking = found.log.rank(severity=-0.1)
        assert [d for _, d in stable.seeds] == [ranking.distance(log.rank(severity=-0.1)) for log in logs]
