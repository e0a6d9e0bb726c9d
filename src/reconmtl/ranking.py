"""Layers in the order in which their tasks fight; from here a plan is a matter of how many to split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reconmtl.errors import PlanError, nearest
from reconmtl.plan import Plan, check_k

if TYPE_CHECKING:
    from reconmtl.conflicts import ConflictLog


class Ranking:
    """Layers ordered by their conflict scores, best candidate for a split first.

    Attributes:
        layers: Names, most conflicts first; ties in network order.
        scores: Conflicts of each, in the same order.
        severity: The S that was counted with.
        possible: The highest score there could have been at any layer: measured steps times task pairs.
        measured: The highest there could have been at each layer, in the same order: pairs in which both tasks reached
            the layer with a gradient that is not zero.
        error: The largest error of a score: zero, unless a log of counts was asked between multiples of 0.001.
        noise: Layers whose gradients are rounding noise, see `ConflictLog.noise`.
    """

    def __init__(
        self, of: ConflictLog, scores: Mapping[str, int], *, severity: float, possible: int, error: int = 0
    ) -> None:
        ordered = sorted(of.layers, key=lambda n: -scores[n])  # sorted is stable: ties keep network order
        self.layers = tuple(ordered)
        self.scores = tuple(scores[n] for n in ordered)
        self.severity = severity
        self.possible = possible
        measured = dict(zip(of.layers, _measured(of), strict=True))
        self.measured = tuple(measured[n] for n in ordered)
        noisy = of.noise().tolist() if of.layers else []
        self.noise = frozenset(n for n, noise in zip(of.layers, noisy, strict=True) if noise)
        self.error = error
        self.tasks = of.tasks
        self.network_layers = of.layers
        self.sizes = of.sizes
        self.types = of.types

    def __repr__(self) -> str:
        best = ", ".join(f"{n} {s}" for n, s in zip(self.layers[:3], self.scores, strict=False))
        error = f" +-{self.error}" if self.error else ""
        return f"Ranking({len(self.layers)} layers at S={self.severity}, of {self.possible}{error}: {best}, ...)"

    def top(self, k: int) -> Plan:
        """The plan that splits the K layers with most conflicts.

        Raises:
            PlanError: If K is not between 1 and the number of layers.
        """
        check_k(k, len(self.layers))
        return self._plan(self.layers[:k], k=k)

    def budget(self, *, megabytes: float) -> Plan:
        """The plan that walks the ranking and splits every layer that still fits a budget.

        Args:
            megabytes: Parameters that the split may add: (tasks - 1) copies, fp32, in units of 2**20 bytes.

        Raises:
            PlanError: If not even the smallest layer fits.
        """
        left = megabytes
        picked = []
        for name in self.layers:
            added = (len(self.tasks) - 1) * self.sizes[name] * 4 / 2**20
            if added <= left:
                picked.append(name)
                left -= added
        if not picked:
            raise PlanError(
                f"No layer fits into {megabytes} MB; the smallest has {min(self.sizes.values())} parameters."
            )
        return self._plan(picked, megabytes=megabytes)

    def _plan(self, names: Sequence[str], **how: object) -> Plan:
        scores = dict(zip(self.layers, self.scores, strict=True))
        chosen = {"by": "conflict", "severity": self.severity, **how, "scores": {n: scores[n] for n in names}}
        return Plan(tasks=self.tasks, layers=names, chosen=chosen)

    def distance(self, other: Ranking) -> float:
        """Mean difference of the layers' positions in two rankings; 0 for equal ones.

        Raises:
            PlanError: If the rankings are not of the same layers; one missing layer is named.

        Reference: Shi et al., Recon, ICLR 2023, Eq. 22.
        """
        if set(self.layers) != set(other.layers):
            missing = min(set(self.layers) ^ set(other.layers))
            raise PlanError(
                f"Rankings of different layers cannot be compared: {missing!r} is in one only. "
                f"{nearest(missing, other.layers)}"
            )
        position = {n: i for i, n in enumerate(other.layers)}
        return sum(abs(i - position[n]) for i, n in enumerate(self.layers)) / len(self.layers)


def _measured(log: ConflictLog) -> list[int]:
    """Cosines that there are at each layer of a log, in network order."""
    counts = log.counts
    found = counts.layers.long().sum((0, 2)) if counts is not None else (~log.cosines().isnan()).sum((0, 2))
    return [int(n) for n in found]
