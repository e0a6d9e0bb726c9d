"""Averaging by shares of columns, over threads that stand for processes: Gram and update are those of the mean rows."""

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reconmtl import reduction
from reconmtl.errors import ProbeError
from reconmtl.passes import Layout, Segment
from reconmtl.reduction import Reduction

SIZES = (5, 1, 7, 3)
TASKS = ("a", "b", "c")
REACHED = ((0, 1, 2), (0, 1, 2), (0, 2), (0, 1, 2))  # tasks per layer


class Meeting:
    """Where threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier, self.found = threading.Barrier(size, timeout=20), [None] * size

    def everyone(self, rank: int, value: Tensor) -> list[Tensor]:
        self.found[rank] = value.clone()  # type: ignore[call-overload]
        self.barrier.wait()
        seen: list[Any] = list(self.found)
        self.barrier.wait()
        return seen


class Stand:
    """Takes the place of `Replicas` in one thread."""

    def __init__(self, meeting: Meeting, size: int, rank: int) -> None:
        self.meeting, self.size, self.rank, self.group = meeting, size, rank, self

    def reduced(self, shared: Tensor, packed: Tensor) -> None:
        every = self.meeting.everyone(self.rank, packed.view(self.size, -1))
        shared.copy_(torch.stack([x[self.rank] for x in every]).sum(0))

    def gathered(self, share: Tensor) -> Tensor:
        return torch.stack(self.meeting.everyone(self.rank, share))


def layout() -> Layout:
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    segments = [Segment(f"l{i}", s, s + n, REACHED[i]) for i, (s, n) in enumerate(zip(starts, SIZES, strict=True))]
    shared = [(f"l{i}.weight", nn.Parameter(torch.zeros(n, dtype=torch.float64))) for i, n in enumerate(SIZES)]
    reached = [frozenset(j for j, tasks in enumerate(REACHED) if t in tasks) for t in range(3)]
    own: tuple[tuple[nn.Parameter, ...], ...] = ((), (), ())
    return Layout(
        TASKS, tuple(segments), tuple(shared), tuple(starts), tuple(range(4)), tuple(reached), own,
        torch.float64, torch.device("cpu"),
    )  # fmt: skip


def rows_of(rank: int) -> Tensor:
    rows = torch.randn(3, sum(SIZES), generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    for segment in layout().segments:
        for t in set(range(3)) - set(segment.tasks):
            rows[t, segment.start : segment.stop] = 0
    return rows


def together(size: int, weigh: Any = None, failing: int | None = None) -> list[Any]:
    """Every thread's (Gram, update), or the error it ended with."""
    meeting, results = Meeting(size), [None] * size

    def run(rank: int) -> None:
        step = Reduction(Stand(meeting, size, rank), layout(), keep=weigh is not None)  # type: ignore[arg-type]
        rows = rows_of(rank)
        for positions in ([0, 1], [2], [3]):  # stages
            columns = torch.cat([torch.arange(s.start, s.stop) for s in (layout().segments[j] for j in positions)])
            step.take(positions, None if rank == failing else rows[:, columns])
        error = ValueError("torn") if rank == failing else None
        try:
            counts = step.finish(weigh, torch.tensor([[rank, 1]]), error)
            results[rank] = (step.gram, step.total, counts)  # type: ignore[call-overload]
        except (ValueError, ProbeError) as raised:
            results[rank] = raised  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.fixture(autouse=True)
def threads_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(value: Tensor, group: Stand) -> None:
        value.copy_(torch.stack(group.meeting.everyone(group.rank, value)).sum(0))

    def broadcast(value: Tensor, group: Stand, group_src: int) -> None:
        value.copy_(group.meeting.everyone(group.rank, value)[group_src])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast", broadcast)


@pytest.mark.parametrize("bucket", [8, 200, 2**20])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_and_update_are_those_of_the_mean_rows(
    size: int, bucket: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "BUCKET", bucket)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    mean = torch.stack([rows_of(r) for r in range(size)]).mean(0)
    for gram, total, counts in together(size, (lambda *_: weights) if weighted else None):
        for k, segment in enumerate(layout().segments):
            part = mean[:, segment.start : segment.stop]
            expected = part @ part.T
            absent = [t for t in range(3) if t not in segment.tasks]
            assert gram[k][absent].isnan().all()
            here = list(segment.tasks)
            torch.testing.assert_close(gram[k][here][:, here], expected[here][:, here], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, weights @ mean if weighted else mean.sum(0), rtol=1e-12, atol=1e-12)
        assert counts.tolist() == [[sum(range(size)), size]]


def test_a_failure_of_one_stops_all_with_its_own_error_and_a_sentence() -> None:
    found = together(3, failing=1)
    assert isinstance(found[1], ValueError)
    for other in (found[0], found[2]):
        assert isinstance(other, ProbeError) and "1 of 3 processes failed" in str(other)
