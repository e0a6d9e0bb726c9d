"""Jobs in processes: what waits for what, what a failure leaves alone, and that nothing is left behind."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reconmtl.choices import decide
from reconmtl.errors import ReconError, RunError
from reconmtl.jobs import Job
from reconmtl.settings import Settings
from reconmtl.workers import (
    STOPPED,
    Here,
    Processes,
    closing,
    count,
    first_failure,
    here_or_processes,
    run_jobs,
    sentence,
)


@pytest.fixture
def decided() -> Any:
    return decide(Settings(problem="planted", epochs=1, accelerator="cpu", methods=("joint",)))


@dataclass
class Scripted:
    """Workers of which the test decides how each job ends; a job is done when it is submitted."""

    slots: int
    errors: dict[str, Exception]
    order: list[str]

    def submit(self, slot: int, job: Job) -> Future[None]:
        assert 0 <= slot < self.slots
        self.order.append(str(job))
        future: Future[None] = Future()
        error = self.errors.get(str(job))
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
        return future


def test_what_needs_a_log_waits_for_it_and_for_what_follows_from_it(decided: Any) -> None:
    jobs = [Job(decided, "recon", 0, "m", log="log"), Job(decided, "probe", 0, "log"), Job(decided, "single", 0, "s")]
    scripted = Scripted(1, {}, [])
    run_jobs(jobs, scripted, done=lambda job: scripted.order.append(f"after {job}"), failed=first_failure)
    assert scripted.order == [
        "probe seed 0",
        "after probe seed 0",
        "recon seed 0",
        "after recon seed 0",
        "single seed 0",
        "after single seed 0",
    ]


def test_a_failure_takes_along_only_what_waits_for_it(decided: Any) -> None:
    names = (("probe", "log", None), ("recon", "a", "log"), ("joint", "b", None), ("probe", "two", None))
    jobs = [Job(decided, m, 0, out, log=log) for m, out, log in (*names, ("random", "c", "two"))]
    failures: dict[str, str] = {}

    def done(job: Job) -> None:
        if job.out == "two":
            raise RunError("no plan can be made of it")

    def failed(job: Job, error: Exception) -> None:
        failures[job.out] = sentence(error)

    scripted = Scripted(2, {"joint seed 0": ValueError("a bug\nof the user's")}, [])
    scripted.errors["recon seed 0"] = RunError("never reached")
    run_jobs(
        [replace(jobs[0], seed=7), *jobs[1:]],
        Scripted(1, {"probe seed 7": RunError("x  y")}, []),
        done=done,
        failed=failed,
    )
    assert failures == {
        "log": "x y",
        "a": "the probe that it takes its layers from failed",
        "two": "no plan can be made of it",
        "c": "the probe that it takes its layers from failed",
    }
    failures.clear()
    run_jobs(jobs[2:3], scripted, done=done, failed=failed)
    assert failures == {"b": "ValueError: a bug of the user's"}
    with pytest.raises(ValueError, match="a bug"):
        run_jobs(jobs[2:3], scripted, done=done, failed=first_failure)
    with pytest.raises(RunError, match="was killed"):
        first_failure(jobs[0], BrokenProcessPool())
    assert "killed" in sentence(BrokenProcessPool())


def test_side_by_side_is_bounded_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert [count(None, "auto", n) for n in (0, 1, 4, 9)] == [1, 1, 4, 6]
    assert count(8, "auto", 3) == 3 and count(2, "auto", 9) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count(None, "auto", 9) == 4 and count(None, "cpu", 9) == 6


def test_one_job_at_a_time_is_done_here() -> None:
    with here_or_processes(1, "never") as found:
        assert isinstance(found, Here)


PROBLEM = """
import os, signal, time
from reconmtl.problems import planted
def killed():
    os.kill(os.getpid(), signal.SIGKILL)
def wrong():
    raise RuntimeError("a bug of the user's")
def slow():
    open(str(os.getpid()), "w").close()
    time.sleep(60)
def make():
    return planted.make()
"""


@contextmanager
def _others(tmp_path: Path) -> Iterator[None]:
    yield
    for path in tmp_path.glob("[0-9]*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_a_killed_process_is_replaced_and_an_interrupt_leaves_none(
    decided: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PROBLEM)

    def job(function: str) -> Job:
        of = replace(decided, problem=f"{tmp_path}/mine.py:{function}")
        return Job(of, "joint", 0, str(tmp_path / function), accelerator="cpu")

    failures: dict[str, str] = {}

    def failed(which: Job, error: Exception) -> None:
        failures[Path(which.out).name] = sentence(error)

    with _others(tmp_path), pytest.raises(KeyboardInterrupt), here_or_processes(1, "never", apart=True) as found:
        run_jobs([job("wrong"), job("killed"), job("make")], found, done=lambda _: None, failed=failed)
        assert job("make").finished
        assert list(failures) == ["wrong", "killed"] and "mine.py:7" in failures["wrong"]
        assert failures["killed"] == "the process was killed, most likely for want of memory"
        found.submit(0, job("slow"))
        while not list(tmp_path.glob("[0-9]*")):
            time.sleep(0.05)
        raise KeyboardInterrupt


def test_a_training_that_is_told_to_stop_saves_its_state_first(decided: Any, tmp_path: Path) -> None:
    endless = replace(decided, epochs=10**6)
    job = Job(endless, "joint", 0, str(tmp_path / "joint"), accelerator="cpu")
    with pytest.raises(KeyboardInterrupt), here_or_processes(1, "never", apart=True) as found:
        assert isinstance(found, Processes)
        found.submit(0, job)
        while not (tmp_path / "joint" / "seed0" / "metrics.jsonl").exists():
            time.sleep(0.05)
        (process,) = (w for pool in found._pools.values() for w in (pool._processes or {}).values())
        raise KeyboardInterrupt
    deadline = time.monotonic() + 60
    while process.exitcode is None and time.monotonic() < deadline:  # the pool's thread is about to learn it
        time.sleep(0.05)
    assert process.exitcode == STOPPED and not job.finished  # it left by itself, between two steps
    assert (tmp_path / "joint" / "seed0" / "last.ckpt").exists()


def test_workers_are_closed_once_and_as_the_work_ended() -> None:
    closed: list[bool] = []

    class Fake:
        def close(self, *, kill: bool) -> None:
            closed.append(kill)

    with closing(Fake()):
        pass
    with pytest.raises(ReconError), closing(Fake()):
        raise ReconError
    assert closed == [False, True]
