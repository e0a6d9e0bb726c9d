"""Collects what the probe measures: Gram matrices while they fit a bound, beyond it exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from reconmtl.conflicts import ConflictLog, count
from reconmtl.counts import Counts
from reconmtl.errors import ProbeError, RunError
from reconmtl.layers import Layer
from reconmtl.passes import Layout, Segment

CHUNK = 64
"""Steps whose Grams stay on the device before they are copied to the CPU at once."""

LIMIT = 256 * 2**20
"""Bytes of Gram matrices that are kept. Two tasks and 41 layers reach it after 545,000 steps, 40 tasks after 2,000."""


class Recorder:
    """Grows step by step; tasks and layers may appear later than the first step.

    Args:
        layers: All layers of the model, in network order.
        limit: Bytes of Gram matrices beyond which counts replace them.
    """

    def __init__(self, layers: Sequence[Layer], *, limit: float = LIMIT) -> None:
        self.layers = layers
        self.limit = limit
        self._tasks: list[str] = []
        self._sizes: dict[str, int] = {}
        self._pending: tuple[Layout, list[Tensor], bool] | None = None
        self._chunks: list[tuple[Layout, Tensor]] = []
        self._bytes = 0
        self._counts: Counts | None = None
        self._counted: tuple[list[str], list[str]] = ([], [])  # layers and tasks of `_counts`
        self._skipped = 0

    def add(self, layout: Layout, gram: Tensor, *, skip: bool = False) -> None:
        """Append one step's Gram matrices; waits for no accelerator but once per CHUNK steps.

        Args:
            layout: What was measured.
            gram: Inner products [layers, tasks, tasks], kept as they are.
            skip: Leave the step out if it is not finite, as a gradient scaler does, instead of raising an error.
        """
        self.know(layout)
        if self._pending is not None:
            before, grams, skipping = self._pending
            if not _alike(before, layout) or skipping != skip or len(grams) == CHUNK:
                self._flush()
        if self._pending is None:
            self._pending = (layout, [], skip)
        self._pending[1].append(gram)

    def know(self, layout: Layout) -> None:
        """Give tasks and layers their places, in the order in which they are first seen."""
        self._tasks += [t for t in layout.tasks if t not in self._tasks]
        for s in layout.segments:
            self._sizes[s.layer] = max(self._sizes.get(s.layer, 0), s.stop - s.start)

    @property
    def recorded(self) -> bool:
        """Whether there is a step."""
        self._flush()
        return bool(self._chunks) or self._counts is not None

    def _flush(self) -> None:
        if self._pending is None:
            return
        layout, pending, skip = self._pending
        chunk = torch.stack(pending).cpu()  # the only place where an accelerator has to be waited for
        self._pending = None
        finite = chunk.diagonal(dim1=2, dim2=3).isfinite()  # [steps, layers, tasks]
        for k, segment in enumerate(layout.segments):
            if len(segment.tasks) < len(layout.tasks):
                finite[:, k, [i for i in range(len(layout.tasks)) if i not in segment.tasks]] = True  # absent
        if skip:
            kept = finite.flatten(1).all(1)
            chunk = chunk[kept]
            self._skipped += int((~kept).sum())
            if not len(chunk):
                return
        elif not finite.all():
            _, k, i = (~finite).nonzero()[0].tolist()
            raise ProbeError(
                f"The gradient of task {layout.tasks[i]!r} at layer {layout.segments[k].layer!r} is not finite. "
                "Lower the learning rate, or look for a loss that divides by zero. With a gradient scaler, "
                "pass the losses unscaled and `scaler=`: the steps that it skips are then left out."
            )
        self._chunks.append((layout, chunk))
        self._bytes += chunk.nbytes // 2  # what is kept in the end is the upper triangle
        if self._counts is not None or self._bytes > self.limit:
            for taken, grams in self._chunks:
                self._count(taken, grams)
            self._chunks = []

    def _count(self, layout: Layout, chunk: Tensor) -> None:
        names, tasks = self._names(), list(self._tasks)
        for start in range(0, len(chunk), CHUNK):
            found = count(_packed(layout, chunk[start : start + CHUNK], names, tasks), len(tasks))
            if self._counts is None:
                self._counts = found
            else:
                if self._counted != (names, tasks):
                    self._counts = self._moved(self._counts, names, tasks)
                self._counts = self._counts.added(found)
            self._counted = (names, tasks)

    def _moved(self, counts: Counts, names: list[str], tasks: list[str]) -> Counts:
        before, after = _pairs(self._counted[1]), {pair: i for i, pair in enumerate(_pairs(tasks))}
        at = [names.index(n) for n in self._counted[0]]
        return counts.spread(at, [after[pair] for pair in before], (len(names), len(after)))

    @property
    def skipped(self) -> int:
        """Steps that were left out because they were not finite."""
        self._flush()
        return self._skipped

    def _names(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.name in self._sizes]

    def state_dict(self) -> dict[str, Any]:
        """All that has been recorded; what waits is not joined, so that a stop leaves no trace in the log."""
        shapes: dict[tuple[object, ...], int] = {}

        def at(layout: Layout) -> int:
            key = (layout.tasks, tuple(astuple(s) for s in layout.segments), str(layout.dtype).removeprefix("torch."))
            return shapes.setdefault(key, len(shapes))

        chunks = [{"of": at(layout), "grams": grams} for layout, grams in self._chunks]
        waiting = None
        if self._pending is not None:
            layout, grams, skip = self._pending
            waiting = {"of": at(layout), "grams": torch.stack(grams), "skip": skip}
        return {
            "tasks": list(self._tasks),
            "sizes": dict(self._sizes),
            "chunks": chunks,
            "waiting": waiting,
            "shapes": list(shapes),
            "bytes": self._bytes,
            "counts": None if self._counts is None else self._counts.tensors(),
            "counted": self._counted,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: Any, device: torch.device) -> None:  # noqa: ANN401 from a file
        """Go on from what `state_dict` gave; `device` is where further Gram matrices come from.

        Raises:
            RunError: If it is damaged, or of another network.
        """
        try:
            known = {layer.name for layer in self.layers}
            layouts = [_restored(shape, known, device) for shape in state["shapes"]]
            chunks = [(layouts[c["of"]], _grams(c["grams"], layouts[c["of"]])) for c in state["chunks"]]
            waiting = state["waiting"]
            pending = None
            if waiting is not None:
                layout = layouts[waiting["of"]]
                pending = (layout, list(_grams(waiting["grams"], layout).to(device).unbind()), bool(waiting["skip"]))
            counts = None if state["counts"] is None else Counts.from_tensors(state["counts"])
            names, tasks = state["counted"]
            if not known.issuperset(state["sizes"]) or not known.issuperset(names):
                raise ValueError("it was recorded on other layers")
            self._tasks, self._sizes = [str(t) for t in state["tasks"]], {n: int(v) for n, v in state["sizes"].items()}
            self._chunks, self._pending, self._skipped = chunks, pending, int(state["skipped"])
            self._bytes, self._counts, self._counted = int(state["bytes"]), counts, (list(names), list(tasks))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RunError(f"what the probe has recorded cannot be read ({error}).") from None

    def log(self, *, every: int) -> ConflictLog:
        """What has been recorded so far.

        Args:
            every: One of how many steps was measured.

        Raises:
            ProbeError: If nothing was recorded, or no layer is shared by two tasks.
        """
        self._flush()
        if not self._chunks and self._counts is None:
            skipped = f" ({self._skipped} steps were not finite and left out)" if self._skipped else ""
            raise ProbeError(
                f"Nothing has been recorded yet{skipped}: call `probe.backward(losses)` in the training loop first."
            )
        names = self._names()
        if not names:
            raise ProbeError("No layer is reached by the losses of two tasks: there is nothing shared to measure.")
        record: Tensor | Counts
        if self._counts is None:
            record = torch.cat([_packed(layout, chunk, names, self._tasks) for layout, chunk in self._chunks])
        else:
            record = self._counts
        types = {layer.name: layer.type for layer in self.layers}
        return ConflictLog(record, tasks=self._tasks, layers=names, sizes=self._sizes, types=types, every=every)


def _alike(one: Layout, other: Layout) -> bool:
    return one is other or (one.tasks, one.segments) == (other.tasks, other.segments)


def _restored(shape: Any, known: set[str], device: torch.device) -> Layout:  # noqa: ANN401 from a file
    """What is needed of a layout to make a log; the network's parameters are not."""
    tasks, segments, dtype = shape
    found = getattr(torch, dtype) if dtype in ("float32", "float64", "bfloat16", "float16") else None
    parts = tuple(Segment(str(n), int(a), int(b), tuple(map(int, who))) for n, a, b, who in segments)
    if found is None or not {s.layer for s in parts} <= known or any(i >= len(tasks) for s in parts for i in s.tasks):
        raise ValueError("it was recorded on other layers")
    return Layout(tuple(tasks), parts, (), (), (), (), (), found, device)


def _grams(grams: Any, layout: Layout) -> Tensor:  # noqa: ANN401 from a file
    n = len(layout.tasks)
    if tuple(grams.shape[1:]) != (len(layout.segments), n, n) or not grams.is_floating_point():
        raise ValueError(f"Gram matrices have shape {list(grams.shape)}")
    found: Tensor = grams
    return found


def _pairs(tasks: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]


def _packed(layout: Layout, chunk: Tensor, names: Sequence[str], tasks: Sequence[str]) -> Tensor:
    """Upper triangles over all layers and tasks, NaN where this layout has none."""
    n = len(tasks)
    rows, columns = torch.triu_indices(n, n)
    if tuple(tasks) == layout.tasks and tuple(names) == layout.layers:
        return chunk[:, :, rows, columns]
    full = chunk.new_full((chunk.shape[0], len(names), n, n), torch.nan)
    at = torch.tensor([tasks.index(t) for t in layout.tasks])
    where = torch.tensor([names.index(name) for name in layout.layers], dtype=torch.long)
    full[:, where[:, None, None], at[None, :, None], at[None, None, :]] = chunk
    return full[:, :, rows, columns]
