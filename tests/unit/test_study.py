import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reconmtl.errors import ReconError, RunError
from reconmtl.plan import Plan
from reconmtl.problems import planted
from reconmtl.settings import Settings
from reconmtl.study import run_study


def _settings(out: Path, **changes: Any) -> Settings:
    base = Settings(problem="planted", out=out, epochs=4, probe_epochs=1, seeds=(0, 1), jobs=1, progress="never")
    return replace(base, **changes)


def test_a_study_ends_with_the_table_the_layers_and_every_file(tmp_path: Path) -> None:
    out = tmp_path / "study"
    methods = ("single", "joint", "recon", "random", "smallest", "first", "last")
    study = run_study(_settings(out, methods=methods))
    assert set(study.plan.layers) == {f"blocks.{i}" for i in planted.FIGHTING}
    assert [row.label for row in study.comparison.rows] == [
        "single-task",
        "joint",
        "joint w/ Recon",
        "joint w/ 2 random layers",
        "joint w/ 2 smallest layers",
        "joint w/ first 2 layers",
        "joint w/ last 2 layers",
    ]
    rows = {row.label: row for row in study.comparison.rows}
    for row in rows.values():
        assert row.seeds == (0, 1)
    assert rows["single-task"].delta_m is not None
    assert rows["single-task"].delta_m.mean == pytest.approx(0, abs=1e-9)
    # a third of what both tasks want cannot be shared: joint training is far worse, splitting the two layers mends it
    joint, recon = rows["joint"].delta_m, rows["joint w/ Recon"].delta_m
    assert joint is not None
    assert recon is not None
    assert joint.mean < -100
    assert recon.mean > joint.mean / 4
    assert rows["joint w/ Recon"].conflict_share is not None
    assert rows["joint"].conflict_share is not None
    for text in (study.text, (out / "table.md").read_text()):
        for piece in ("n = 2 seeds (0, 1), 4 epochs", "512 training and 256 test", "blocks.1", "| joint w/ Recon"):
            assert piece in text
    assert Plan.load(out / "plan.json") == study.plan
    assert json.loads((out / "comparison.json").read_text())["rows"][1]["label"] == "joint"
    assert json.loads((out / "config.json").read_text())["k"] == 2
    assert "torch" in json.loads((out / "env.json").read_text())["packages"]
    # the two random plans are drawn with the seed of their run
    random_plans = [Plan.load(out / "random" / f"seed{s}" / "plan.json") for s in (0, 1)]
    assert random_plans[0] != random_plans[1]


def test_resume_keeps_what_is_finished_and_does_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "study"
    settings = _settings(out, methods=("joint", "recon"), seeds=(0,))
    first = run_study(settings)
    with pytest.raises(RunError, match=r"--resume.*--overwrite"):
        run_study(settings)
    for name in ("result.json", "last.ckpt"):  # as if it had been interrupted before
        (out / "recon" / "seed0" / name).unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "joint").rglob("*") if p.is_file()}
    log = (out / "log" / "log.json").stat().st_mtime_ns
    again = run_study(replace(settings, resume=True))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert (out / "log" / "log.json").stat().st_mtime_ns == log
    assert [r.metrics for row in again.comparison.rows for r in row.runs] == [
        r.metrics for row in first.comparison.rows for r in row.runs
    ]
    with pytest.raises(RunError, match="epochs = 4, now 5"):
        run_study(replace(settings, resume=True, epochs=5))
    overwritten = run_study(replace(settings, overwrite=True, epochs=5))
    assert "5 epochs" in overwritten.text


def test_a_study_can_be_extended_by_methods_and_seeds(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "study", methods=("joint",), seeds=(1,), epochs=2)
    run_study(settings)
    result = tmp_path / "study" / "joint" / "seed1" / "result.json"
    stamp = result.stat().st_mtime_ns
    more = run_study(replace(settings, methods=("joint", "recon"), seeds=(1, 0), resume=True))
    assert result.stat().st_mtime_ns == stamp
    assert [(row.label, row.seeds) for row in more.comparison.rows] == [("joint", (1, 0)), ("joint w/ Recon", (1, 0))]
    with pytest.raises(RunError, match=r"seeds = \[1, 0\], now \[0\]"):
        run_study(replace(settings, seeds=(0,), resume=True))


def test_a_study_that_is_older_than_an_option_goes_on_as_it_was_made(tmp_path: Path) -> None:
    out = tmp_path / "study"
    settings = _settings(out, methods=("joint",), seeds=(0,), epochs=1)
    run_study(settings)
    content = json.loads((out / "config.json").read_text())
    optional = ("k", "record", "norm_stats", "init", "precision", "compile", "processes", "sync_batchnorm",
                "max_batches", "note")  # fmt: skip
    for name in optional:
        # The planted problem's preset chooses K = 2, which is no default.
        (out / "config.json").write_text(json.dumps({n: v for n, v in content.items() if n != name}))
        if name == "k":
            with pytest.raises(RunError, match=r"other settings \(k = None, now 2"):
                run_study(replace(settings, resume=True))
        else:
            assert run_study(replace(settings, resume=True)).comparison.rows
            assert json.loads((out / "config.json").read_text()) == content  # from now on it says so
    changes: dict[str, Any] = {"init": "fresh", "record": 3, "norm_stats": "shared", "precision": "bf16-mixed"}
    for name, change in changes.items():
        (out / "config.json").write_text(json.dumps({n: v for n, v in content.items() if n != name}))
        with pytest.raises(RunError, match=rf"other settings \({name} = {content[name]!r}, now {change!r}"):
            run_study(replace(settings, resume=True, **{name: change}))
    for name in set(content) - {*optional, "format", "methods"}:
        (out / "config.json").write_text(json.dumps({n: v for n, v in content.items() if n != name}))
        with pytest.raises(RunError, match=f"{name} = (not said|None), now "):  # what it did cannot be known
            run_study(replace(settings, resume=True))
    (out / "config.json").write_text(json.dumps(content | {"newer": 1}))
    with pytest.raises(RunError, match="newer = 1, now not said"):
        run_study(replace(settings, resume=True))


def test_bad_values_are_reported_together_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "study"
    with pytest.raises(ReconError) as error:
        run_study(_settings(out, severity=0.5, k=0, methods=("jiont",), tasks=("plus", "minsu"), probe_epochs=9))
    for piece in ("S = 0.5", "K = 0", "Nearest: 'joint'", "Nearest: 'minus'", "probe_epochs = 9"):
        assert piece in str(error.value)
    assert not out.exists()


def test_more_layers_than_there_are_is_refused_with_their_number(tmp_path: Path) -> None:
    with pytest.raises(ReconError, match=r"K = 7 .* from 1 to 6"):
        run_study(_settings(tmp_path / "study", k=7))
    assert not (tmp_path / "study").exists()  # found out before anything was trained


def test_side_by_side_gives_the_same_numbers_as_one_after_the_other(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "one", methods=("single", "joint", "recon"), seeds=(0,), epochs=2)
    one = run_study(settings)
    two = run_study(replace(settings, out=tmp_path / "two", jobs=2))
    for row, other in zip(one.comparison.rows, two.comparison.rows, strict=True):
        for key, spread in row.metrics.items():
            assert other.metrics[key].mean == pytest.approx(spread.mean, rel=1e-4)


def test_an_error_in_a_worker_process_arrives_as_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loss is"):
        run_study(_settings(tmp_path / "study", lr=1e30, jobs=2, methods=("joint",), seeds=(0,)))
