"""Loggers are told what metrics.jsonl says; one that fails costs no training."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import reconmtl as rm
from reconmtl.choices import find_logger
from reconmtl.errors import ConfigError, ReconError
from reconmtl.loggers import Loggers, TensorBoard, flat
from reconmtl.problems import planted


class Memory:
    """Remembers what it was told; fails at an epoch if asked to."""

    def __init__(self, fails: int = 0) -> None:
        self.told: list[Any] = []
        self.fails = fails

    def start(self, name: str, config: Mapping[str, object], folder: Path | None) -> None:
        self.told.append(("start", name, config["method"], folder))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        if epoch == self.fails:
            raise ConnectionError("no network")
        self.told.append((epoch, dict(values)))

    def close(self) -> None:
        self.told.append("close")


def lines(run: rm.Run) -> list[dict[str, Any]]:
    assert run.path is not None
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_a_logger_is_told_every_line_of_every_run(tmp_path: Path) -> None:
    memory = Memory()
    (joint,) = rm.fit(planted.make(), epochs=2, out=tmp_path / "joint", loggers=[memory])
    start, *epochs, close = memory.told
    assert start == ("start", "joint seed 0", "joint", joint.path) and close == "close"
    assert epochs == [(line["epoch"], flat(line)) for line in lines(joint)]
    assert epochs[-1][1]["test/plus/mse"] == joint.metrics["plus"]["mse"] and "loss" in epochs[-1][1]
    memory.told.clear()
    (single,) = rm.fit(planted.make(), method="single", epochs=1, loggers=[memory], out=tmp_path / "single")
    assert [sorted(e[1]) for e in memory.told[1:-1]] == [
        ["loss/plus", "test/plus/mse"],
        ["loss/minus", "test/minus/mse"],
    ]
    assert len(lines(single)) == 2


def test_a_failing_logger_is_reported_once_and_the_training_goes_on(tmp_path: Path) -> None:
    bad, good = Memory(fails=2), Memory()
    with pytest.warns(RuntimeWarning, match=r"Memory failed .* from epoch 2 on: no network.*metrics\.jsonl") as caught:
        (run,) = rm.fit(planted.make(), epochs=4, out=tmp_path, loggers=[bad, good])
    assert len(caught) == 1 and len(lines(run)) == 4
    assert [t[0] for t in bad.told[1:-1]] == [1] and bad.told[-1] == "close"
    assert [t[0] for t in good.told[1:-1]] == [1, 2, 3, 4]


def test_what_is_no_logger_is_refused_before_the_training(tmp_path: Path) -> None:
    for wrong in (Memory, object(), "tensorboard"):
        with pytest.raises(ConfigError, match="start, log and close"):
            rm.fit(planted.make(), epochs=1, out=tmp_path / "run", loggers=[wrong])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_a_line_becomes_finite_or_infinite_numbers_by_name() -> None:
    entry = {"epoch": 3, "tasks": ["a", "b"], "loss": 0.5, "absent": {"a": 0.25}}
    entry |= {"test": {"a": {"acc": 1}, "b": {"acc": "nan"}}, "val": {"a": {"acc": 2.0}}}
    assert flat(entry) == {"loss": 0.5, "test/a/acc": 1.0, "val/a/acc": 2.0, "absent/a": 0.25}
    Loggers([]).log(entry)


def test_loggers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "class Good:\n    def start(self, name, config, folder): ...\n    def log(self, values, epoch): ...\n"
        "    def close(self): ...\nclass Half:\n    def start(self, name, config, folder): ...\n"
        "class Needs(Good):\n    def __init__(self, what): ...\n"
    )
    assert type(find_logger(f"{tmp_path}/mine.py:Good")).__name__ == "Good"
    for spec, complaint in (
        ("tensorbord", "Nearest: 'tensorboard'"),
        (f"{tmp_path}/mine.py:Godo", "Nearest: 'Good'"),
        (f"{tmp_path}/mine.py:Half", "methods start, log and close"),
        (f"{tmp_path}/mine.py:Needs", "cannot be made without arguments"),
    ):
        with pytest.raises(ReconError, match=complaint):
            find_logger(spec)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r'pip install "reconmtl\[tensorboard\]"'):
        find_logger("tensorboard")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of TensorBoard's own
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    (run,) = rm.fit(planted.make(), epochs=2, out=tmp_path / "run", loggers=[TensorBoard()])
    assert run.path is not None
    read = EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    for line in lines(run):
        for name, value in flat(line).items():
            (event,) = [e for e in read.Scalars(name) if e.step == line["epoch"]]
            assert math.isclose(event.value, value, rel_tol=1e-6)
    rm.fit(planted.make(), epochs=1, loggers=[TensorBoard(tmp_path / "boards")])
    assert list((tmp_path / "boards" / "joint seed 0").glob("events*"))
