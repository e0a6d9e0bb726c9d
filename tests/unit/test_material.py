"""Folders and runs become what a report is about; damage is named."""

import dataclasses
import json
from pathlib import Path

import pytest

from reconmtl.errors import RunError
from reconmtl.reporting.material import gather
from reconmtl.reporting.stability import Stability
from reconmtl.reporting.windows import Windows
from reconmtl.runs import Run
from studies import conflict_log, network_names, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), tasks=["seg", "depth", "edges"], layers=network_names(12))


def test_damaged_curves_are_named_with_their_line(tmp_path: Path) -> None:
    write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(4), seeds=(0,))
    curve = tmp_path / "s" / "joint" / "seed0" / "metrics.jsonl"
    for line in ("{", "[]", '{"epoch": 1, "test": 3}', '{"epoch": "x", "test": {}}', '{"test": {"a": {"acc": null}}}'):
        curve.write_text('{"epoch": 1, "loss": 1.0}\n' + line + "\n")
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
            gather(tmp_path / "s")


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
