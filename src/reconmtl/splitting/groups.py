"""Groups of tasks as bit masks, and partitions of tasks as tuples of them: what branches are keyed by.

A mask has bit i set when task i belongs to the group. Branches of one value are keyed by disjoint masks, in the order
of their lowest bit, so that equal partitions are equal tuples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from reconmtl.errors import SplitError
from reconmtl.layers import GROUP_SEPARATOR, group_label

Masks = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """The tasks of one split model, in the plan's order; masks are relative to it."""

    tasks: tuple[str, ...]

    @cached_property
    def full(self) -> int:
        """The mask of all tasks."""
        return (1 << len(self.tasks)) - 1

    def mask(self, group: Iterable[str]) -> int:
        """The mask of a group of task names."""
        return sum(1 << self.tasks.index(t) for t in group)

    def names(self, mask: int) -> tuple[str, ...]:
        """The task names of a mask."""
        return tuple(t for i, t in enumerate(self.tasks) if mask >> i & 1)

    def label(self, mask: int) -> str:
        """The name under which a group's copy is stored, e.g. 'depth+seg'."""
        label = self._labels.get(mask)
        if label is None:
            label = self._labels[mask] = group_label(self.names(mask))
        return label

    @cached_property
    def _labels(self) -> dict[int, str]:
        return {}

    def parse(self, label: str) -> int | None:
        """The mask of a label, or None if it is no label of these tasks."""
        names = label.split(GROUP_SEPARATOR)
        return self.mask(names) if names and all(n in self.tasks for n in names) else None

    def each(self) -> Masks:
        """The partition into single tasks."""
        return tuple(1 << i for i in range(len(self.tasks)))

    def __getstate__(self) -> dict[str, object]:
        return {"tasks": self.tasks}


class MissingTaskError(SplitError):
    """A value that was computed for some tasks only is needed for another one."""


@lru_cache(maxsize=4096)
def refine(*partitions: Masks) -> Masks:
    """The coarsest partition that is at least as fine as each of the given ones, on the tasks that all of them have."""
    out = partitions[0]
    for p in partitions[1:]:
        if p != out:
            out = tuple(a & b for a in out for b in p if a & b)
    return tuple(sorted(out, key=lowest))


def lowest(mask: int) -> int:
    """The lowest set bit of a mask."""
    return mask & -mask


@lru_cache(maxsize=4096)
def union(masks: Masks) -> int:
    """The tasks that a partition covers."""
    total = 0
    for m in masks:
        total |= m
    return total


@lru_cache(maxsize=4096)
def locate(masks: Masks, targets: Masks) -> tuple[int, ...]:
    """For each target, the index of the group that contains it."""
    return tuple(next(i for i, m in enumerate(masks) if m & t == t) for t in targets)


@lru_cache(maxsize=4096)
def complete(masks: Masks, full: int) -> Masks:
    """A partition of all tasks: the given groups and, if any task is left, one group of those that are."""
    rest = full & ~union(masks)
    return tuple(sorted((*masks, rest), key=lowest)) if rest else masks
