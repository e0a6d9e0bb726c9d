"""Trainings that are killed (SIGKILL) at random moments and continued end as one that was never killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reconmtl as rm
from reconmtl.errors import RunError
from reconmtl.problems import planted

KILLS = 20


class Slow(planted.PlantedData):
    """Takes its time, so that a training lasts for seconds."""

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        time.sleep(0.004)
        return super().batch(indices)


class Chain(nn.Module):
    """Blocks that can be searched."""

    blocks = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        width = planted.make().sample().shape[1]
        self.first = nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({t: nn.Linear(8, planted.LAYERS) for t in planted.TASKS})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.second(self.first(x))
        return {t: head(z) for t, head in self.heads.items()}


def _search(out: Path, **changes: Any) -> None:
    """Most of the time goes into the search of the tree, the rest into its training."""
    problem = planted.make().replace(model=Chain, train=Slow(512, seed=1))
    options: dict[str, Any] = {"epochs": 6, "lr": 0.01, "milestones": (), "method": "bmtas:epochs=8,resource_weight=0"}
    rm.fit(problem, out=out, resume=True, machine=rm.Machine(checkpoint_steps=2), **options | changes)


def _fit(out: Path, **changes: Any) -> None:
    problem = planted.make().replace(train=Slow(512, seed=1))
    plan = rm.Plan(tasks=planted.TASKS, layers=["blocks.1"])
    options: dict[str, Any] = {"epochs": 30, "momentum": 0.9, "milestones": (10, 20), "record": 2}
    machine = rm.Machine(checkpoint_steps=5)
    rm.fit(problem, plan=plan, out=out, resume=True, machine=machine, **options | changes)


def _in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def _files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {n: b for n, b in found.items() if Path(n).name not in ("timing.json", "env.json")}


def _main(fit: Callable[..., None], kills: int) -> int:
    draw = random.Random(0)
    equal = done = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit(folder / "warm", epochs=1, milestones=())  # what is imported here need not be imported in every child
        began = time.perf_counter()
        os.waitpid(_in_child(lambda: fit(folder / "whole")), 0)
        lasts = time.perf_counter() - began
        expected = _files(folder / "whole")
        print(f"uninterrupted: {lasts:.1f} s, {len(expected)} files")
        while done < kills:
            out = folder / f"killed{done}"
            pid = _in_child(lambda: fit(out))  # noqa: B023 called at once
            at = draw.uniform(0, lasts)
            time.sleep(at)
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] != signal.SIGKILL:  # it ended before: the machine has less to do by now
                lasts *= 0.9
                shutil.rmtree(out)
                continue
            done += 1
            lines = len((out / "seed0" / "metrics.jsonl").read_text().splitlines()) if _epoch(out) else 0
            os.waitpid(_in_child(lambda: fit(out)), 0)  # noqa: B023
            same = _files(out) == expected
            equal += same
            print(f"killed after {at:5.2f} s, {lines:2} epochs written: {'equal' if same else 'DIFFERENT'}", flush=True)
    print(f"{equal} of {kills} killed and continued trainings equal the uninterrupted one")
    return 0 if equal == kills else 1


def _epoch(out: Path) -> bool:
    return (out / "seed0" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
@pytest.mark.parametrize("work", ["fit", "search"])
def test_killed_and_continued_trainings_equal_an_uninterrupted_one(
    work: str, capfd: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run([sys.executable, __file__, work], capture_output=True, text=True, timeout=800, check=False)
    with capfd.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_training_in_the_folder_of_a_killed_one_is_refused(tmp_path: Path) -> None:
    problem = planted.make()
    rm.fit(problem, out=tmp_path, epochs=1, milestones=())
    (tmp_path / "seed0" / "result.json").unlink()
    with pytest.raises(RunError, match="other settings"):
        rm.fit(problem, out=tmp_path, resume=True, epochs=2, milestones=())


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(_main(_search, 10) if sys.argv[1:] == ["search"] else _main(_fit, KILLS))
