"""Two processes with half of each batch each train as one with all of it: `torchrun`, gloo, CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.checkpoints import read_checkpoint

TASKS = ("a", "b", "c")
BATCH = 8
STEPS = 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 8), nn.Linear(8, 8), nn.GroupNorm(2, 8)
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


class Points:
    """Half of the samples have no target for `b`, and most of the batches of one process none for `c`."""

    def __init__(self, n: int, seed: int) -> None:
        self.x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
        self.fingerprint = f"{n}-{seed}"

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        x = self.x[i]
        return x, {"a": x.sum(), "b": x[0] if i % 2 else None, "c": x[1] * x[2] if i % 7 == 0 else None}


def error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs()


def _of(data: Points, task: str) -> list[tuple[Tensor, Tensor]]:
    """A task's own data set: the samples that have a target for it."""
    return [(x, y) for x, targets in map(data.__getitem__, range(len(data))) if (y := targets[task]) is not None]


def make(batch_size: int = BATCH, own: bool = False) -> rm.Problem:
    sets: dict[str, Any] = {"train": Points(16 * 5, 1), "test": Points(43, 2)}
    if own:
        sets = {name: {t: _of(data, t) for t in TASKS} for name, data in sets.items()}
    return rm.Problem(
        model=Net,
        tasks=[rm.Task(t, loss=nn.functional.mse_loss, metrics=[rm.Metric("mae", error, best="min")]) for t in TASKS],
        **sets,
        recipe=rm.Recipe(epochs=2, batch_size=batch_size, lr=0.05, momentum=0.9),
        name="points",
    )


PLAN = rm.Plan(tasks=TASKS, layers={"second": [["a", "b"], ["c"]]})
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recorded": {"record": True},
    "split": {"plan": PLAN, "record": True},
    "own": {"own": True},
    "single": {"method": "single"},
    "cagrad": {"method": "cagrad", "plan": PLAN, "record": True},
    "graddrop": {"method": "graddrop"},
    "geometric-mean": {"method": "geometric-mean"},
}


def _work(out: Path, batch_size: int) -> None:
    for name, options in METHODS.items():
        problem = make(batch_size, options.get("own", False))
        rm.fit(problem, out=out / name, **{k: v for k, v in options.items() if k != "own"})
    rm.probe(make(batch_size), epochs=1, out=out / "probe")


def _torchrun(*command: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 400, "check": False}
    return subprocess.run(start, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options | changes)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="no gloo over sockets there")
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = _torchrun(__file__, str(tmp_path / "two"), str(BATCH))
    assert done.returncode == 0, done.stdout + done.stderr
    _work(tmp_path / "one", 2 * BATCH)
    for name in METHODS:
        two, one = (tmp_path / n / name / "seed0" for n in ("two", "one"))
        mine, theirs = read_checkpoint(two / "last.ckpt").model, read_checkpoint(one / "last.ckpt").model
        assert mine.keys() == theirs.keys()
        worst = max(float((mine[k] - v).abs().max()) for k, v in theirs.items())
        with capsys.disabled():
            print(f"\n{name}: parameters differ by {worst:.1e} at most after {STEPS} steps", end="")
        assert worst < 1e-5
        a, b = (json.loads((f / "result.json").read_text()) for f in (two, one))
        for task in TASKS:
            assert a["metrics"][task]["mae"] == pytest.approx(b["metrics"][task]["mae"], rel=1e-5)
        assert a["parameters"] == b["parameters"]
        assert json.loads((two / "config.json").read_text())["machine"]["processes"] == 2
        losses = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (two, one)]
        for x, y in zip(*losses, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
            assert x.get("absent") == y.get("absent")
    for name in ("recorded/seed0/log", "split/seed0/log", "probe"):
        logs = [rm.ConflictLog.load(tmp_path / n / name).cosines() for n in ("two", "one")]
        torch.testing.assert_close(*logs, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="no gloo over sockets there")
def test_the_command_runs_in_two_processes_and_speaks_once(tmp_path: Path) -> None:
    out = tmp_path / "study"
    command = ["-m", "reconmtl", "run", "planted", "--out", str(out), "--epochs", "2", "--seeds", "0", "--quiet"]
    done = _torchrun(*command, "--methods", "single", "joint", "recon", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 3
    assert {p.name for p in out.iterdir()} >= {"config.json", "log", "plan.json", "single", "joint", "recon"}
    again = _torchrun(*command, "--methods", "single", "joint", "recon", cwd=tmp_path)
    assert again.returncode != 0
    assert "exists already" in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="no gloo over sockets there")
def test_two_processes_that_were_stopped_go_on_together(tmp_path: Path) -> None:
    whole = _torchrun(__file__, str(tmp_path / "whole"), "stop", "0")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    stopped = _torchrun(__file__, str(tmp_path / "parts"), "stop", "60")
    assert stopped.returncode != 0
    assert "Saved in epoch" in stopped.stderr
    assert not (tmp_path / "parts" / "seed0" / "result.json").exists()
    again = _torchrun(__file__, str(tmp_path / "parts"), "stop", "0")
    assert again.returncode == 0, again.stdout + again.stderr
    for name in ("last.ckpt", "result.json", "metrics.jsonl", "log/grams.safetensors"):
        assert (tmp_path / "parts/seed0" / name).read_bytes() == (tmp_path / "whole/seed0" / name).read_bytes(), name


class Stops(Points):
    """The second process gets a signal while it fetches its n-th sample."""

    left = 0

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        Stops.left -= 1
        if Stops.left == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(i)


def _stop(out: Path, after: int) -> None:
    Stops.left = after
    rm.fit(make().replace(train=Stops(16 * 5, 1)), plan=PLAN, record=True, out=out, resume=True)


def test_more_devices_than_processes_are_refused_with_the_command() -> None:
    with pytest.raises(rm.ReconError, match=r"devices = 4: .*torchrun --nproc-per-node=4 -m reconmtl"):
        rm.Machine(devices=4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "stop":
        _stop(Path(sys.argv[1]), int(sys.argv[3]))
    else:
        _work(Path(sys.argv[1]), int(sys.argv[2]))
