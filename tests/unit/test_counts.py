import math
from pathlib import Path

import pytest
import torch
from torch import nn

from reconmtl.conflicts import ConflictLog
from reconmtl.counts import COARSE, GRID, WINDOWS, Counts, bins, edges
from reconmtl.errors import RunError
from reconmtl.layers import find_layers
from reconmtl.passes import Layout, Segment
from reconmtl.recording import Recorder

TASKS = ("a", "b", "c", "d")


def _log(steps: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> ConflictLog:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(steps, 3, len(TASKS), 5, dtype=torch.float64, generator=generator)
    grams = (rows @ rows.mT).to(dtype)
    grams[::7, 1, 2] = math.nan  # a task that does not reach a layer
    grams[::7, 1, :, 2] = math.nan
    upper = torch.triu_indices(len(TASKS), len(TASKS))
    names = ["x", "y", "z"]
    return ConflictLog(
        grams[:, :, upper[0], upper[1]],
        tasks=TASKS,
        layers=names,
        sizes=dict.fromkeys(names, 5),
        types=dict.fromkeys(names, "Linear"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_are_those_of_strict_comparison_next_to_every_edge(dtype: torch.dtype) -> None:
    for per_unit in (GRID, COARSE):
        edge = edges(per_unit, dtype)
        assert edge[0] == -1
        assert edge[-1] == 1
        near = torch.cat([edge, edge.nextafter(torch.tensor(-2.0, dtype=dtype)), edge.nextafter(edge + 1)]).clamp(-1, 1)
        expected = torch.searchsorted(edge, near, right=True) - 1
        assert torch.equal(bins(near, per_unit), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_on_the_grid_are_those_of_the_grams(dtype: torch.dtype) -> None:
    log = _log(300, dtype=dtype)
    counted = log.counted()
    for k in range(GRID):
        s = -k / GRID
        assert torch.equal(counted.scores(severity=s), log.scores(severity=s)), s
        assert not counted.score_errors(severity=s).any()
    assert torch.equal(counted.pair_scores(severity=-0.15), log.pair_scores(severity=-0.15))
    assert counted.rank(severity=-0.1).layers == log.rank(severity=-0.1).layers
    whole = log.whole()
    for s in (0.0, -0.01, -0.02, -0.03):
        assert int((counted.whole() < s).sum()) == int((whole < torch.tensor(s, dtype=dtype)).sum())
    assert torch.equal(counted.noise(), log.noise())


def test_between_two_thresholds_the_error_is_within_its_bound() -> None:
    log = _log(2000)
    counted = log.counted()
    for s in (-0.00051, -0.12345, -0.5003):
        error = (counted.scores(severity=s) - log.scores(severity=s)).abs()
        assert (error <= counted.score_errors(severity=s)).all()
        assert counted.rank(severity=s).error == int(counted.score_errors(severity=s).max()) > 0


def test_windows_of_time_stay_between_half_and_all() -> None:
    log = _log(1000)
    total = None
    for start in range(0, 1000, 8):
        part = log.window(start, start + 8).counted().counts
        assert part is not None
        total = part if total is None else total.added(part)
        assert len(total.lengths) <= WINDOWS
    assert total is not None
    assert len(total.lengths) >= WINDOWS // 2
    assert total.steps == 1000
    assert total.lengths.tolist() == [32] * 31 + [8]
    whole = log.counted().counts
    assert whole is not None
    assert torch.equal(total.layers.sum(0), whole.layers[0])
    torch.testing.assert_close(total.power, whole.power, rtol=1e-2, atol=0)
    counted = log._with(total)
    assert torch.equal(counted.window(64, 160).scores(severity=-0.2), log.window(64, 160).scores(severity=-0.2))
    with pytest.raises(RunError, match="per window"):
        counted.window(1, 32)
    with pytest.raises(RunError, match="over the whole recording"):
        counted.window(0, 32).pair_scores(severity=-0.5)


def test_counts_are_written_and_read(tmp_path: Path) -> None:
    log = _log(50).counted()
    log.save(tmp_path)
    again = ConflictLog.load(tmp_path)
    assert isinstance(again.counts, Counts)
    assert again.steps == 50
    assert torch.equal(again.scores(severity=-0.3), log.scores(severity=-0.3))
    assert again.counts.dtype == torch.float32
    with pytest.raises(RunError, match="holds counts of cosines, not Gram matrices"):
        again.cosines()


def test_logs_of_both_kinds_merge() -> None:
    first, second = _log(40), _log(60, seed=1)
    both = first.merge([second])
    for mixed in (first.counted().merge([second]), first.merge([second.counted()])):
        assert mixed.steps == 100
        assert torch.equal(mixed.scores(severity=-0.25), both.scores(severity=-0.25))


def test_a_log_of_celebas_size_is_small_and_keeps_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is written does not grow with the steps, so that few of them per window tell the size of 10,000."""
    monkeypatch.setattr("reconmtl.recording.CHUNK", 2)
    tasks, layers = 40, 40
    layout = Layout(
        tasks=tuple(f"t{i}" for i in range(tasks)),
        segments=tuple(Segment(str(k), k, k + 1, tuple(range(tasks))) for k in range(layers)),
        shared=(),
        starts=(),
        owner=(),
        reached=(),
        exclusive=(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    recorder = Recorder(find_layers(nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)))), limit=0)
    rows = torch.randn(layers, tasks, 3, generator=torch.Generator().manual_seed(0))
    steps = 2 * (WINDOWS + 3)
    for _ in range(steps):
        recorder.add(layout, rows @ rows.mT)
    recorder.log(every=1).save(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 60 * 2**20
    log = ConflictLog.load(tmp_path)
    assert log.counts is not None
    windows = len(log.counts.lengths)
    assert 16 <= windows <= WINDOWS
    assert log.counts.layers.shape == (windows, layers, 2 * GRID + 1)
    assert log.counts.whole.shape == (windows, 2 * GRID + 1)
    assert log.counts.pairs.shape == (layers, tasks * (tasks - 1) // 2, 2 * COARSE + 1)
    pairs = tasks * (tasks - 1) // 2
    assert log.counts.layers.sum((0, 2)).tolist() == [steps * pairs] * layers
    assert int(log.counts.whole.sum()) == int(log.counts.pairs[0].sum()) == steps * pairs
