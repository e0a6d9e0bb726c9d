"""Methods x seeds x problems: what fails is reported, what is finished stays, and only what is missing is done."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from commandline import Say, caller
from reconmtl.errors import ConfigError
from reconmtl.settings import SweepSettings
from reconmtl.sweeping import run_sweep
from reconmtl.workers import here_or_processes

MINE = """
import os
from reconmtl.problems import planted

def fine():
    return planted.make().replace(name="fine")

def broken():
    problem = planted.make()
    network = problem.model
    def loss(output, target):  # of the trainings, not of the rehearsal
        if os.path.exists("mended") or len(output) < 32:
            return planted.summed_error(output, target)
        raise RuntimeError("a bug of the user's")
    from reconmtl import Task
    return problem.replace(tasks=[Task(t.name, loss=loss, metrics=t.metrics) for t in problem.tasks], name="broken")
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepSettings:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return SweepSettings(
        problems=("planted", "mine.py:broken"),
        methods=("joint", "recon"),
        seeds=(0, 1),
        epochs=1,
        k=2,
        accelerator="cpu",
        jobs=1,
        out=tmp_path / "sweep",
        quiet=True,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own for each training, which would take longer to start than to train."""
    monkeypatch.setattr("reconmtl.sweeping.here_or_processes", lambda jobs, mode, **_: here_or_processes(jobs, mode))


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}


@pytest.mark.usefixtures("here")
def test_a_failure_is_reported_and_the_same_sweep_does_what_is_missing(settings: SweepSettings) -> None:
    out = settings.out
    assert out is not None
    first = run_sweep(settings)
    assert list(first.studies) == ["planted"] and first.skipped == 0
    assert [(f.problem, f.method, f.seed) for f in first.failures] == [
        ("mine.py:broken", *what) for what in (("probe", 0), ("recon", 0), ("recon", 1), ("joint", 0), ("joint", 1))
    ]
    assert "RuntimeError: a bug of the user's" in first.failures[0].reason and "mine.py" in first.failures[0].reason
    assert "in loss" in first.failures[0].traceback and first.failures[1].traceback == ""
    assert "mine.py:broken, joint, seed 1: RuntimeError" in first.text and "| joint w/ Recon" in first.text
    assert json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(first.to_dict()))
    before = stamps(out)
    assert len(before) == 4
    Path("mended").touch()
    second = run_sweep(settings)
    assert second.failures == () and second.skipped == 4 and set(second.studies) == {"planted", "mine.py:broken"}
    after = stamps(out)
    assert len(after) == 8 and {p: after[p] for p in before} == before
    third = run_sweep(replace(settings, seeds=(0, 1, 2)))  # one more seed
    assert third.skipped == 8 and len(stamps(out)) == 12
    assert [row.seeds for row in third.studies["planted"].comparison.rows] == [(0, 1, 2)] * 2


@pytest.mark.usefixtures("here")
def test_a_damaged_run_or_log_is_a_failure_and_the_tables_go_on(settings: SweepSettings) -> None:
    settings = replace(settings, problems=("planted", "mine.py:fine"))
    out = settings.out
    assert out is not None
    assert run_sweep(settings).failures == ()
    run, log = out / "planted-default" / "joint" / "seed1" / "result.json", out / "mine-fine" / "log" / "log.json"
    whole = {path: path.read_text() for path in (run, log)}
    run.write_text("{")
    log.write_text("[]")
    found = run_sweep(settings)
    assert [(f.problem, f.method, f.seed) for f in found.failures] == [
        ("planted", "joint", 1),
        ("mine.py:fine", "probe", 0),
    ]
    assert str(run) in found.failures[0].reason and "Delete" in found.failures[0].reason
    assert str(log) in found.failures[1].reason and f"Delete {log.parent}" in found.failures[1].reason
    rows = found.studies["planted"].comparison.rows
    assert [(row.label, row.seeds) for row in rows] == [("joint", (0,)), ("joint w/ Recon", (0, 1))]
    assert str(run) in found.studies["planted"].text
    for path, content in whole.items():
        path.write_text(content)
    assert run_sweep(settings).failures == ()


def test_the_faults_of_all_problems_are_reported_before_anything_is_made(settings: SweepSettings) -> None:
    wrong = replace(settings, problems=("plantd", "mine.py:fine", "mine.py:fin"), k=7, lr=-1.0)
    with pytest.raises(ConfigError) as caught:
        run_sweep(wrong, faults=["from the file"])
    for piece in ("from the file", "'plantd'", "no function 'fin'", "lr = -1.0"):
        assert piece in str(caught.value)
    with pytest.raises(ConfigError, match="at least one"):
        run_sweep(replace(settings, problems=()))
    Path("other").mkdir()
    Path("other/mine.py").write_text(MINE)
    with pytest.raises(ConfigError, match="would share the folder 'mine-fine'"):
        run_sweep(replace(settings, problems=("mine.py:fine", "other/mine.py:fine")))
    assert not Path("sweep").exists()


@pytest.mark.usefixtures("here")
def test_a_sweep_ends_with_exit_code_3_if_something_failed(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say: Say = caller(tmp_path, monkeypatch, capsys)
    (tmp_path / "s.yaml").write_text(
        f"problems: [planted, 'mine.py:broken']\nmethods: [joint]\nseeds: [0]\nepochs: 1\nout: {settings.out}\n"
    )
    said = say("sweep", "s.yaml", "--accelerator", "cpu", "--jobs", "1", "--fast-dev-run", "--json")
    assert said.code == 3
    assert {f["problem"] for f in said.json["failures"]} == {"mine.py:broken"}
    again = say("sweep", "s.yaml", "--accelerator", "cpu", "--jobs", "1", "--problems", "planted", "--fast-dev-run")
    assert again.code == 0 and "1 trainings were there already" in again.out


@pytest.mark.slow
def test_an_interrupted_sweep_ends_cleanly_and_goes_on(tmp_path: Path) -> None:
    words = ["sweep", "--problems", "planted", "--methods", "joint", "single", "--seeds", "0", "1", "--jobs", "2"]
    words += ["--accelerator", "cpu", "--epochs", "150", "--probe-epochs", "1", "--record", "0", "--out", "o"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reconmtl", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "o").rglob("result.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and "repeat the command" in errors and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # what keeps count of semaphores for Python ends a moment later
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    before = stamps(tmp_path / "o")
    assert 0 < len(before) < 4
    done = subprocess.run(
        [sys.executable, "-m", "reconmtl", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = stamps(tmp_path / "o")
    assert len(after) == 4 and {p: after[p] for p in before} == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_ray_does_the_same_as_processes(settings: SweepSettings, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = run_sweep(replace(settings, out=tmp_path / "here"))
    there = run_sweep(replace(settings, out=tmp_path / "there", engine="ray", jobs=2))
    assert {(f.problem, f.method, f.seed) for f in there.failures} == {
        (f.problem, f.method, f.seed) for f in here.failures
    }
    for row, other in zip(
        here.studies["planted"].comparison.rows, there.studies["planted"].comparison.rows, strict=True
    ):
        assert row.seeds == other.seeds == (0, 1)
        for key, spread in row.metrics.items():
            assert other.metrics[key].mean == pytest.approx(spread.mean, rel=1e-5)
    Path("mended").touch()
    assert run_sweep(replace(settings, out=tmp_path / "there", engine="ray", jobs=2)).failures == ()
