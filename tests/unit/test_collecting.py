"""Runs are found wherever they lie, in an order people expect; what is no run is said."""

from dataclasses import asdict
from pathlib import Path

import pytest

from reconmtl.collecting import find_runs
from reconmtl.errors import RunError
from reconmtl.files import write_json
from reconmtl.runs import Run


def write(folder: Path, method: str, seed: int, *, finished: bool = True) -> None:
    run = Run(
        method=method,
        label=method,
        seed=seed,
        metrics={"a": {"acc": 1.0}},
        directions={"a": {"acc": "max"}},
        parameters=1,
        seconds=1.0,
        fingerprint="f",
        network="Net",
    )
    write_json(folder / "config.json", {"method": method, "seed": seed, "problem": "p", "norm_stats": "shared"})
    if finished:
        write_json(folder / "result.json", run.to_dict())


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two studies, of which one says in which order its methods go."""
    write_json(tmp_path / "one" / "config.json", {"methods": ["single", "joint"], "problem": "p", "norm_stats": "x"})
    for method in ("joint", "single"):
        for seed in (10, 2):
            write(tmp_path / "one" / method / f"seed{seed}", method, seed)
    write(tmp_path / "two" / "joint" / "seed0", "joint", 0)
    write(tmp_path / "two" / "joint" / "seed1", "joint", 1, finished=False)
    return tmp_path


def test_methods_come_in_the_order_of_their_study_and_seeds_by_number(sweep: Path) -> None:
    runs, out = find_runs([sweep / "one"])
    assert [(r.method, r.seed) for r in runs] == [("single", 2), ("single", 10), ("joint", 2), ("joint", 10)]
    assert out == []
    runs, out = find_runs([sweep])
    assert [(r.method, r.seed) for r in runs][-1] == ("joint", 0) and len(runs) == 5
    assert [asdict(o) for o in out] == [
        {
            "run": str(sweep / "two" / "joint" / "seed1"),
            "reason": "not finished, it has no result.json. Repeat the command that began it with --resume.",
            "damaged": False,
        }
    ]


def test_one_folder_given_twice_or_within_another_is_found_once(sweep: Path) -> None:
    inside = sweep / "one" / "single" / "seed2"
    runs, _ = find_runs([inside, sweep / "one", sweep / "one" / ".." / "one"])
    assert len(runs) == 4 and runs[0].path is not None and runs[0].path.samefile(inside)


def test_folders_without_runs_are_all_named(sweep: Path) -> None:
    (sweep / "empty").mkdir()
    (sweep / "other").mkdir()
    (sweep / "other" / "config.json").write_text("[")
    with pytest.raises(RunError, match=r"none is no folder; .*empty holds no run; .*other holds no run\. Give"):
        find_runs([sweep / "one", sweep / "none", sweep / "empty", sweep / "other"])
    with pytest.raises(RunError, match=r"no finished run: .*seed1: not finished"):
        find_runs([sweep / "two" / "joint" / "seed1"])


def test_a_damaged_run_keeps_none_of_the_others_from_being_seen(sweep: Path) -> None:
    damaged = sweep / "one" / "joint" / "seed2"
    (damaged / "result.json").write_text('{"format": "reconmtl.run/1"}')
    runs, out = find_runs([sweep / "one"])
    assert len(runs) == 3 and out[0].run == str(damaged) and "missing or wrong fields" in out[0].reason
    assert out[0].damaged and out[0].reason.endswith("with --resume to train it again.")
