"""A training that was stopped and continued ends as one that was not: every file of its folder, byte for byte."""

import errno
import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from commandline import QUICK, caller
from reconmtl.checkpoints import read_checkpoint
from reconmtl.errors import Interrupted, ProblemError, RunError
from reconmtl.loop import Job, network
from reconmtl.recording import Recorder

TASKS = ("a", "b")


class Net(nn.Module):
    """What has state of its own while training: dropout, running statistics, a buffer that is not persistent."""

    calls: Tensor
    blocks = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.calls.add_(1)
        z = self.second(self.drop(torch.relu(self.norm(self.first(x))))) * (1 + 0.01 * self.calls)
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


class Noisy:
    """Points that are disturbed by all three global generators, of which some have no target for the second task."""

    fingerprint = "noisy"

    def __init__(self, n: int, stop: Callable[[], None] = lambda: None) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
        self.stop = stop

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        self.stop()
        x = self.x[i] + 0.1 * torch.randn(4) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
        return x, {"a": x.sum(), "b": None if i % 3 else x[0] - x[1]}


class After:
    """Sends a signal while the n-th sample is fetched."""

    def __init__(self, n: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.left, self.number = n, number

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def _problem(stop: Callable[[], None] = lambda: None, **recipe: Any) -> rm.Problem:
    def error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()

    values: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr": 0.05, "momentum": 0.9, "milestones": (2,)}
    return rm.Problem(
        model=Net,
        tasks=[rm.Task(t, loss=nn.functional.mse_loss, metrics=[rm.Metric("mae", error, best="min")]) for t in TASKS],
        train=Noisy(16, stop),
        test=Noisy(6, stop),
        val=Noisy(5, stop),
        recipe=rm.Recipe(**{**values, **recipe}),
    )


ADAM = {"optimizer": "adamw", "momentum": 0.0, "weight_decay": 0.1}
PLAN = rm.Plan(tasks=TASKS, layers=["second"])
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "joint": ({}, {"record": True}),
    "adam": (ADAM, {"record": 2}),
    "split": ({}, {"plan": PLAN, "record": True}),
    "single": ({}, {"method": "single"}),
    "searched": ({}, {"method": "bmtas:epochs=2,resource_weight=0", "plan": PLAN}),
}
SAMPLES = 3 * (16 + 6 + 5)


def _files(folder: Path) -> dict[str, bytes]:
    """Everything but what differs between any two runs: times, and where and when it ran."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {n: b for n, b in found.items() if Path(n).name not in ("timing.json", "env.json")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stops", [(1,), (17,), (20, 3), (30,), (SAMPLES - 1,), (5, 5, 5, 5, 23)], ids=str)
def test_a_stopped_training_ends_as_if_it_had_not_been_stopped(
    method: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    recipe, options = METHODS[method]
    rm.fit(_problem(**recipe), out=tmp_path / "whole", seeds=(5,), **options)
    for n in stops:
        with pytest.raises(Interrupted, match=r"Interrupted by SIGTERM\. Saved in epoch \d of [23].* to go on"):
            rm.fit(_problem(After(n), **recipe), out=tmp_path / "parts", resume=True, seeds=(5,), **options)
        assert not (tmp_path / "parts" / "seed5" / "result.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run = rm.fit(_problem(**recipe), out=tmp_path / "parts", resume=True, seeds=(5,), **options)[0]
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
    assert set(_files(tmp_path / "whole" / "seed5")) >= {"config.json", "last.ckpt", "metrics.jsonl", "result.json"}
    assert run.seconds > 0


def test_a_stopped_probe_ends_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole = rm.probe(_problem(), epochs=2, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        rm.probe(_problem(After(20)), epochs=2, out=tmp_path / "parts")
    with pytest.raises(RunError, match=r"exists already\. Continue it with --resume"):
        rm.probe(_problem(), epochs=2, out=tmp_path / "parts")
    log = rm.probe(_problem(), epochs=2, out=tmp_path / "parts", resume=True)
    assert torch.equal(log.grams.nan_to_num(), whole.grams.nan_to_num())
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
    again = rm.probe(_problem(After(1)), epochs=2, out=tmp_path / "parts", resume=True)  # read, not made again
    assert torch.equal(again.grams.nan_to_num(), whole.grams.nan_to_num())
    with pytest.raises(RunError, match="other settings: epochs = 2, now 1"):
        rm.probe(_problem(), epochs=1, out=tmp_path / "parts", resume=True)


def test_counts_that_replace_a_long_record_do_not_show_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconmtl.recording.CHUNK", 5)
    monkeypatch.setattr(Recorder.__init__, "__kwdefaults__", {"limit": 100.0})
    for folder, stop in (("whole", None), ("parts", After(19)), ("parts", After(9)), ("parts", None)):
        problem = _problem() if stop is None else _problem(stop)
        try:
            rm.fit(problem, record=True, out=tmp_path / folder, resume=True)
        except Interrupted:
            assert stop is not None
    log = rm.Run.load(tmp_path / "whole" / "seed0").log
    assert log is not None
    assert log.counts is not None
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_a_second_signal_ends_at_once_and_without_a_folder_nothing_is_saved(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as ended:
        rm.fit(_problem(twice), out=tmp_path)
    assert isinstance(ended.value, Interrupted)
    assert ended.value.saved == ""
    with pytest.raises(KeyboardInterrupt):
        rm.fit(_problem(After(3, signal.SIGINT)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_checkpoints_come_every_epoch_and_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def save(*_: Any, training: Any = None, **__: Any) -> None:
        if training is not None:
            seen.append((training["epoch"], training["sampler"]["step"]))

    monkeypatch.setattr("reconmtl.loop.save_checkpoint", save)
    rm.fit(_problem(), out=tmp_path / "a")
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 0)]
    seen.clear()
    rm.fit(_problem(), out=tmp_path / "b", machine=rm.Machine(checkpoint_steps=3), epochs=2, milestones=())
    assert seen == [(1, 0), (1, 3), (2, 0), (2, 2), (3, 0)]
    seen.clear()
    rm.fit(_problem(), out=tmp_path / "c", machine=rm.Machine(checkpoint_seconds=1e-9), epochs=1, milestones=())
    assert [step for _, step in seen] == [0, 1, 2, 3, 4, 0]


def test_metrics_say_how_often_a_task_was_absent(tmp_path: Path) -> None:
    rm.fit(_problem(batch_size=2), out=tmp_path, epochs=2, milestones=())
    lines = [json.loads(line) for line in (tmp_path / "seed0" / "metrics.jsonl").read_text().splitlines()]
    draw = torch.Generator().manual_seed(0)
    without = [sum(bool((b % 3).all()) for b in torch.randperm(16, generator=draw).split(2)) for _ in lines]
    assert any(without)
    assert [line.get("absent", {}).get("b", 0) for line in lines] == [n / 8 for n in without]


# Damage. --------------------------------------------------------------------------------------------------------------


def _stopped(folder: Path, **options: Any) -> Path:
    with pytest.raises(Interrupted):
        rm.fit(_problem(After(40)), out=folder, **options)
    return folder / "seed0"


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("last.ckpt", b"", r"last\.ckpt cannot be read as a checkpoint"),
        ("last.ckpt", b"\x00" * 64, r"last\.ckpt cannot be read as a checkpoint"),
        ("config.json", b"{", r"seed0 exists already and does not hold results of reconmtl.* empty it yourself"),
        ("metrics.jsonl", b"", r"metrics\.jsonl is shorter than when the checkpoint was written\. Delete this file"),
    ],
)
def test_a_damaged_file_is_named_and_what_to_delete(file: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    folder = _stopped(tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(RunError, match=complaint):
        rm.fit(_problem(), out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["optimizer", "sampler", "random", "epoch", "probe", "written", "absent"])
def test_a_state_that_does_not_fit_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _stopped(tmp_path, record=True)
    path = folder / "last.ckpt"

    def damaged(source: Path) -> Any:
        found = read_checkpoint(source)
        found.training["state"][damage] = {"optimizer": {"a": 1}, "epoch": 9, "written": 10**6}.get(damage, 3)
        return found

    monkeypatch.setattr("reconmtl.loop.read_checkpoint", damaged)
    with pytest.raises(RunError, match=re.escape(f"{path} cannot be continued: ") + ".* Delete this file"):
        rm.fit(_problem(), out=tmp_path, record=True, resume=True)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    _stopped(tmp_path)

    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(6, 7)
            self.heads = nn.ModuleDict({t: nn.Linear(7, 1) for t in TASKS})

    with pytest.raises(RunError, match="was trained with another network"):
        rm.fit(_problem().replace(model=Wider), out=tmp_path, resume=True)


def test_other_settings_are_refused_in_the_middle_too(tmp_path: Path) -> None:
    _stopped(tmp_path)
    with pytest.raises(RunError, match=r"holds a run with other settings: recipe\.lr = 0\.05, now 0\.06\."):
        rm.fit(_problem(lr=0.06), out=tmp_path, resume=True)


def test_a_damaged_result_says_what_to_delete(tmp_path: Path) -> None:
    rm.fit(_problem(), out=tmp_path)
    (tmp_path / "seed0" / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json cannot be read as JSON.*Delete .*seed0 and repeat with --resume"):
        rm.fit(_problem(), out=tmp_path, resume=True)


def test_a_folder_of_a_process_killed_while_it_wrote_the_first_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / ".config.json.0123abcd").write_text("{")
    rm.fit(_problem(), out=tmp_path, resume=True, epochs=1, milestones=())
    assert not list((tmp_path / "seed0").glob(".*"))


def test_a_full_disk_ends_in_a_sentence_and_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rm.fit(_problem(), out=tmp_path / "whole")[0]
    kept, sync = [0], os.fsync

    def full(handle: int) -> None:
        kept[0] += 1
        if kept[0] > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"Cannot write .*: No space left on device"):
        rm.fit(_problem(), out=tmp_path / "parts")
    monkeypatch.undo()
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
    run = rm.fit(_problem(), out=tmp_path / "parts", resume=True)[0]
    assert run.metrics == whole.metrics
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


# Losses that are not finite. ------------------------------------------------------------------------------------------


class Breaks:
    """A loss that is as given from its n-th call on."""

    def __init__(self, n: int, value: float) -> None:
        self.n, self.value = n, value

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.n -= 1
        loss = nn.functional.mse_loss(output, target)
        return loss if self.n > 0 else loss * 0 + self.value


def _breaking(**at: tuple[int, float]) -> rm.Problem:
    """Four steps per epoch; the second task is in every batch."""
    tasks = [rm.Task(t, loss=Breaks(*at.get(t, (10**9, 0.0))), metrics=_problem().tasks[0].metrics) for t in TASKS]
    return _problem(epochs=9).replace(tasks=tasks)


LOWER = "Lower the learning rate (lr = 0.05)"
BROKEN: list[tuple[dict[str, tuple[int, float]], str, str]] = [
    ({"a": (7, torch.inf)}, "inf for task 'a' in epoch 2, step 3 of 4", LOWER),
    # The second task's batch is empty in one of the first five steps.
    ({"a": (5, -torch.inf), "b": (4, torch.nan)}, "-inf for task 'a' and nan for task 'b' in epoch 2, step 1", LOWER),
    ({"b": (1, torch.nan)}, "nan for task 'b' in epoch 1, step 1 of 4", "It was so at once: look for a loss"),
]


@pytest.mark.parametrize(("broken", "told", "hint"), BROKEN, ids=["one", "two", "first"])
@pytest.mark.parametrize("record", [False, True])
def test_a_loss_that_is_not_finite_names_tasks_epoch_step_and_the_way_out(
    broken: dict[str, tuple[int, float]], told: str, hint: str, record: bool, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as caught:
        rm.fit(_breaking(**broken), out=tmp_path, record=record)
    text = str(caught.value)
    assert text.startswith(f"joint seed 0: the loss is {told}") and hint in text
    assert "`reconmtl check PROBLEM`" in text and "--overwrite" in text
    epoch = int(re.findall(r"epoch (\d)", text)[0])
    state = read_checkpoint(tmp_path / "seed0" / "last.ckpt").training
    assert state is not None and state["state"]["epoch"] == epoch  # the last state that can be continued is kept
    assert bool(state["state"]["total"][0].isfinite()) and len(_lines(tmp_path / "seed0")) == epoch - 1


def _lines(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_loss_that_is_not_finite_stops_within_a_long_epoch_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    seen: list[int] = []

    class Long(Noisy):
        def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor | None]]:
            seen.append(i)
            return super().__getitem__(i)

    problem = _breaking(a=(11, torch.nan)).replace(train=Long(4000))
    machine = rm.Machine(checkpoint_steps=7)
    with pytest.raises(RunError, match="nan for task 'a' in epoch 1, step 11 of 1000"):
        rm.fit(problem, out=tmp_path, machine=machine)
    assert len(seen) < 4 * 100
    state = read_checkpoint(tmp_path / "seed0" / "last.ckpt").training
    assert state is not None and state["state"]["sampler"]["step"] == 7


# BatchNorm over several processes. ------------------------------------------------------------------------------------


def _job(**options: Any) -> Job:
    machine = rm.Machine(accelerator="cpu")
    return Job(problem=_problem(), seed=0, record=0, machine=machine, description="", **options)


@pytest.mark.parametrize("plan", [None, rm.Plan(tasks=TASKS, layers=["norm", "second"])])
def test_synchronised_networks_are_converted_before_they_are_split(plan: rm.Plan | None) -> None:
    networks = []
    for synchronised in (None, torch.device("cpu")):
        torch.manual_seed(3)
        networks.append(network(_job(plan=plan), synchronised=synchronised))
    plain, synced = networks
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())
    assert {n: t.shape for n, t in plain.state_dict().items()} == {n: t.shape for n, t in synced.state_dict().items()}
    x = torch.randn(5, 4)
    for model in networks:
        model.eval()
    with torch.no_grad():
        for task, output in plain(x).items():
            assert torch.equal(output, synced(x)[task])


def test_synchronised_statistics_on_cpus_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = rm.Machine(accelerator="cpu", sync_batchnorm=True)
    assert machine.faults() == []  # one process has nothing to share
    assert ["SyncBatchNorm does not work on CPUs" in text for text in machine.faults(2)] == [True]
    with monkeypatch.context() as patch:
        patch.setattr("reconmtl.evaluation.started", lambda: 2)
        patch.setattr("reconmtl.evaluation._fabric", lambda *_: SimpleNamespace(device=torch.device("cpu")))
        for train in (lambda: rm.fit(_problem(), out=tmp_path / "out", machine=machine),
                      lambda: rm.probe(_problem(), epochs=1, out=tmp_path / "out", machine=machine)):  # fmt: skip
            with pytest.raises(ProblemError, match="does not work on CPUs"):
                train()
    say = caller(tmp_path, monkeypatch, capsys)
    words = ("fit", "planted", "--devices", "2", "--sync-batchnorm", "--accelerator", "cpu", "--lr", "-1")
    said = say(*words, "--out", "out")
    assert said.code == 2 and not (tmp_path / "out").exists()
    assert "does not work on CPUs. Leave it out" in said.err and "lr = -1" in said.err
    assert say("fit", *QUICK[:3], "--sync-batchnorm", "--accelerator", "cpu", "--out", "out").code == 0
