"""Which training steps are measured: one of so many, from here to there, or as many as a budget of time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reconmtl.errors import ProbeError, RunError

REHEARSAL = (False, False, False, True, False, True, False, True)
"""Steps by which a budget learns what measuring costs: the first two and the first measured one warm up. Of the others
the shortest count: what else the machine does only ever adds."""


class Schedule:
    """Decides step by step; strided steps tell more than a block of the same number (conflicts are autocorrelated).

    Args:
        every: Measure one step of so many.
        start: First step that may be measured.
        stop: First step that is not measured any more; None never stops.
        overhead: Share of training time that measuring may add, e.g. 0.1; `every` is then found from the first
            `len(REHEARSAL)` steps and kept. Which steps are measured depends on times, so two runs may differ in that.
        clock: Seconds.
        agree: Makes one number of those that several processes have found for `every`.

    Raises:
        ProbeError: If an argument is out of range; every fault is named.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        overhead: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        faults = []
        if not _whole(every) or every < 1:
            faults.append(f"every = {every!r}: expected a whole number of steps, at least 1")
        if not _whole(start) or start < 0:
            faults.append(f"start = {start!r}: expected the number of a step, at least 0")
        elif stop is not None and (not _whole(stop) or stop <= start):
            faults.append(f"stop = {stop!r}: expected the number of a step after start = {start}, or None")
        if overhead is not None:
            if not isinstance(overhead, (int, float)) or isinstance(overhead, bool) or not 0 < overhead < math.inf:
                faults.append(f"overhead = {overhead!r}: expected a share of training time above 0, e.g. 0.1")
            elif every != 1:
                faults.append(f"every = {every} and overhead = {overhead} both say how often to measure: pass one")
        if faults:
            raise ProbeError("; ".join(faults) + ".")
        self.every, self.start, self.stop, self.overhead = every, start, stop, overhead
        self._clock, self._agree = clock, agree
        self._step = 0
        self._first = start  # measured steps are this one and every `every` after it
        self._rehearsed: list[tuple[float, float]] = []  # per step of the rehearsal: begin and end of its backward pass

    @property
    def _rehearsing(self) -> bool:
        return self.overhead is not None and len(self._rehearsed) < len(REHEARSAL)

    @contextmanager
    def step(self) -> Iterator[bool]:
        """Enclose the backward pass of one training step; yields whether to measure it."""
        number, self._step = self._step, self._step + 1
        if number < self.start or (self.stop is not None and number >= self.stop):
            yield False
        elif self._rehearsing:
            began = self._now()
            yield REHEARSAL[len(self._rehearsed)]
            self._rehearsed.append((began, self._now()))
            if not self._rehearsing:
                self._settle(number)
        else:
            yield number >= self._first and (number - self._first) % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, plain data."""
        return {"step": self._step, "every": self.every, "first": self._first, "rehearsed": list(self._rehearsed)}

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401 from a file
        """Go on from what `state_dict` gave.

        Raises:
            RunError: If it is damaged.
        """
        try:
            step, every, first = (int(state[n]) for n in ("step", "every", "first"))
            rehearsed = [(float(begin), float(end)) for begin, end in state["rehearsed"]]
            if step < 0 or every < 1 or len(rehearsed) > len(REHEARSAL):
                raise ValueError(f"step {step}, every {every}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"the probe's schedule cannot be read ({error}).") from None
        if 0 < len(rehearsed) < len(REHEARSAL):
            rehearsed = []  # times before and after a stop cannot be compared
        self._step, self.every, self._first, self._rehearsed = step, every, first, rehearsed

    def _settle(self, number: int) -> None:
        assert self.overhead is not None
        measured = [i for i, m in enumerate(REHEARSAL) if m][1:]
        plain = [i for i, m in enumerate(REHEARSAL) if not m][2:]
        passes = [end - begin for begin, end in self._rehearsed]
        extra = max(min(passes[i] for i in measured) - min(passes[i] for i in plain), 0.0)
        # of a whole step, from end to end: forward, backward, optimizer, data
        step = max(min(self._rehearsed[i][1] - self._rehearsed[i - 1][1] for i in plain), 1e-9)
        self.every = max(1, math.ceil(extra / (self.overhead * step)))
        if self._agree is not None:
            self.every = self._agree(self.every)
        self._first = number + sum(REHEARSAL) * self.every  # the rehearsal's measured steps are paid for first

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # only while rehearsing
        return self._clock()


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
