"""Which layers get one copy per task (or per group of tasks), and how they were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from reconmtl.errors import PlanError, RunError, nearest
from reconmtl.files import read_json, write_json
from reconmtl.layers import GROUP_SEPARATOR, group_label

Partition = tuple[tuple[str, ...], ...]
FORMAT = "reconmtl.plan/1"


class LayerSizes(Protocol):
    """What a control needs to know about a network: a ConflictLog or a Ranking has it."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""

    @property
    def network_layers(self) -> tuple[str, ...]:
        """Shared layers in network order."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Parameters per shared layer."""

    @property
    def types(self) -> Mapping[str, str]:
        """Class name per shared layer."""


def check_tasks(tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the task names as a tuple, or raise a PlanError that lists every name which cannot be used."""
    if isinstance(tasks, str):
        raise PlanError(f"Task names should be a list of names, found the one string {tasks!r}.")
    names = tuple(tasks)
    faults = []
    for name in names:
        if not isinstance(name, str) or not name:
            faults.append(f"{name!r} is not a non-empty string")
        elif any(c in name for c in ".[]" + GROUP_SEPARATOR) or name != name.strip():
            faults.append(f"{name!r} contains one of '.', '[', ']', '+' or outer blanks")
        elif hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
            faults.append(f"{name!r} is an attribute of every nn.Module")
    doubled = sorted({n for n in names if isinstance(n, str) and names.count(n) > 1})
    faults += [f"{n!r} appears more than once" for n in doubled]
    if not names:
        faults.append("there is none")
    if faults:
        raise PlanError("Task names must be distinct, usable names: " + "; ".join(faults) + ". Rename them.")
    return names


class Plan:
    """Which layers are split, and into which groups of tasks.

    Args:
        tasks: Names of all tasks, in order.
        layers: Names (or globs) of layers that get one copy per task; or a mapping from name to a partition of *all*
            tasks into groups that keep sharing, e.g. `{"fc": [["seg", "depth"], ["normal"]]}`.
        chosen: How the plan came about (severity, K, scores ...): free JSON, kept with the file.

    Raises:
        PlanError: If a task name cannot be used or a partition does not hold every task exactly once.

    Example:
        >>> Plan(tasks=["a", "b"], layers=["conv1"]).layers
        {'conv1': (('a',), ('b',))}
    """

    def __init__(
        self,
        *,
        tasks: Iterable[str],
        layers: Iterable[str] | Mapping[str, Sequence[Sequence[str]]],
        chosen: Mapping[str, object] | None = None,
    ) -> None:
        self.tasks = check_tasks(tasks)
        if isinstance(layers, str):
            raise PlanError(f"Layers should be a list of names, or a mapping; found the one string {layers!r}.")
        each = tuple((t,) for t in self.tasks)
        named = layers.items() if isinstance(layers, Mapping) else [(name, each) for name in layers]
        faults: list[str] = []
        self.layers: dict[str, Partition] = {}
        for name, groups in named:
            if not isinstance(name, str) or not name:
                faults.append(f"layer name {name!r} is not a non-empty string")
                continue
            self.layers[name] = self._partition(name, groups, faults)
        if faults:
            raise PlanError("This plan contradicts itself: " + "; ".join(faults) + ".")
        self.chosen: dict[str, object] = dict(chosen or {})

    def _partition(self, name: str, groups: Sequence[Sequence[str]], faults: list[str]) -> Partition:
        if isinstance(groups, str) or not isinstance(groups, Iterable):
            faults.append(f"layer {name!r}: groups must be lists of tasks, got {groups!r}")
            return ()
        groups = list(groups)
        if any(isinstance(g, str) or not isinstance(g, Sequence) for g in groups):
            faults.append(f"layer {name!r}: groups must be lists of tasks, got {groups!r}")
            return ()
        flat = [t for g in groups for t in g]
        if any(len(g) == 0 for g in groups):
            faults.append(f"layer {name!r}: a group of tasks is empty")
        faults += [
            f"layer {name!r}: unknown task {t!r} ({nearest(str(t), self.tasks)})" for t in flat if t not in self.tasks
        ]
        faults += [
            f"layer {name!r}: task {t!r} is in {flat.count(t)} groups, expected 1"
            for t in self.tasks
            if flat.count(t) != 1
        ]
        if faults:
            return ()
        order = {t: i for i, t in enumerate(self.tasks)}
        ordered = [tuple(sorted(g, key=order.__getitem__)) for g in groups]
        return tuple(sorted(ordered, key=lambda g: order[g[0]]))

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.tasks == other.tasks and self.layers == other.layers

    __hash__ = None  # type: ignore[assignment]  # mutable by attribute, like a dict

    def __repr__(self) -> str:
        return f"Plan(tasks={list(self.tasks)}, {len(self.layers)} layers, chosen={self.chosen.get('by', 'by name')!r})"

    def refine(self, other: Plan) -> Plan:
        """Split further: two tasks share a layer afterwards only if both plans let them.

        Raises:
            PlanError: If the plans are for different tasks.
        """
        if set(self.tasks) != set(other.tasks):
            raise PlanError(f"Plans for tasks {list(self.tasks)} and {list(other.tasks)} cannot be combined.")
        whole: Partition = (self.tasks,)
        names = list(dict.fromkeys([*self.layers, *other.layers]))
        layers = {
            n: [
                [t for t in a if t in b]
                for a in self.layers.get(n, whole)
                for b in other.layers.get(n, whole)
                if set(a) & set(b)
            ]
            for n in names
        }
        return Plan(tasks=self.tasks, layers=layers, chosen={"by": "refine", "of": [self.chosen, other.chosen]})

    def labels(self, layer: str) -> list[str]:
        """Names of the copies of one layer: the tasks, or 'a+b' for a group that keeps sharing."""
        return [group_label(g) for g in self.layers[layer]]

    def save(self, path: str | Path) -> None:
        """Write the plan as a small JSON file."""
        content = {"format": FORMAT, "tasks": self.tasks, "layers": self.layers, "chosen": self.chosen}
        try:
            write_json(path, content)
        except RunError:
            raise
        except (TypeError, ValueError) as error:
            raise PlanError(f"This plan cannot be written to {path}: `chosen` is not plain JSON ({error}).") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; a damaged file is a PlanError that names the file and the field."""
        data = read_json(path, PlanError)
        return cls.from_dict(data, source=str(path))

    def to_dict(self) -> dict[str, object]:
        """The plan as plain JSON data."""
        layers = {n: [list(g) for g in groups] for n, groups in self.layers.items()}
        return {"format": FORMAT, "tasks": list(self.tasks), "layers": layers, "chosen": self.chosen}

    @classmethod
    def from_dict(cls, data: object, *, source: str = "this plan") -> Plan:
        """The plan from plain JSON data; anything else is a PlanError that names the source and the field."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"{source}: expected a plan with format {FORMAT!r}, found {found!r}.")
        tasks, layers, chosen = data.get("tasks"), data.get("layers"), data.get("chosen", {})
        if not isinstance(tasks, list) or not all(isinstance(t, str) for t in tasks):
            raise PlanError(f"{source}: field 'tasks' should be a list of names, found {repr(tasks)[:80]}.")
        if not isinstance(layers, dict) or not all(
            isinstance(g, list) and all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in g)
            for g in layers.values()
        ):
            raise PlanError(f"{source}: field 'layers' should map a layer to lists of task names.")
        if not isinstance(chosen, dict):
            raise PlanError(f"{source}: field 'chosen' should be an object, found {type(chosen).__name__}.")
        try:
            return cls(tasks=tasks, layers=layers, chosen=chosen)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None

    # Controls: other ways to choose layers, to compare with. ------------------------------------------------------

    @classmethod
    def _control(cls, of: LayerSizes, names: Sequence[str], **chosen: object) -> Plan:
        picked = set(names)
        return cls(tasks=of.tasks, layers=[n for n in of.network_layers if n in picked], chosen=chosen)

    @classmethod
    def random_layers(cls, of: LayerSizes, k: int, *, seed: int = 0) -> Plan:
        """K random layers (the paper's RSL): the first K of `numpy.random.RandomState(seed).permutation(n)`.

        Raises:
            PlanError: If K is not between 1 and the number of shared layers.

        Reference: Shi et al., Recon, ICLR 2023, Table 7; the published code draws the same permutation.
        """
        names = of.network_layers
        check_k(k, len(names))
        order = np.random.RandomState(seed).permutation(len(names))
        return cls._control(of, [names[i] for i in order[:k]], by="random_layers", k=k, seed=seed)

    @classmethod
    def random_parameters(cls, of: LayerSizes, parameters: int, *, seed: int = 0, exceed: bool = False) -> Plan:
        """Random layers until a budget of parameters per copy is used up (the paper's RSP).

        Args:
            of: The network's shared layers.
            parameters: Budget: parameters of all chosen layers together.
            seed: Of the same permutation that `random_layers` draws.
            exceed: True keeps the layer that exceeds the budget, as the published code does; False skips layers that
                do not fit any more, so that the budget holds.

        Reference: Shi et al., Recon, ICLR 2023, Table 7.
        """
        picked: list[str] = []
        left = parameters
        for i in np.random.RandomState(seed).permutation(len(of.network_layers)):
            name = of.network_layers[i]
            if exceed or of.sizes[name] <= left:
                picked.append(name)
                left -= of.sizes[name]
            if left <= 0:
                break
        if not picked:
            raise PlanError(f"No layer fits into {parameters} parameters; the smallest has {min(of.sizes.values())}.")
        return cls._control(of, picked, by="random_parameters", parameters=parameters, seed=seed, exceed=exceed)

    @classmethod
    def first(cls, of: LayerSizes, k: int) -> Plan:
        """The first K layers in network order."""
        check_k(k, len(of.network_layers))
        return cls._control(of, of.network_layers[:k], by="first", k=k)

    @classmethod
    def last(cls, of: LayerSizes, k: int) -> Plan:
        """The last K layers in network order."""
        check_k(k, len(of.network_layers))
        return cls._control(of, of.network_layers[-k:], by="last", k=k)

    @classmethod
    def smallest(cls, of: LayerSizes, k: int) -> Plan:
        """The K layers with the fewest parameters; ties in network order."""
        check_k(k, len(of.network_layers))
        return cls._control(of, sorted(of.network_layers, key=of.sizes.__getitem__)[:k], by="smallest", k=k)

    @classmethod
    def norms(cls, of: LayerSizes) -> Plan:
        """Every normalisation layer (class name ends with 'Norm', 'Norm1d', 'Norm2d' or 'Norm3d')."""
        names = [n for n in of.network_layers if of.types[n].rstrip("123d").endswith("Norm")]
        if not names:
            raise PlanError("This network has no shared normalisation layer to split.")
        return cls._control(of, names, by="norms", k=len(names))


def check_k(k: int, n: int) -> None:
    """Raise a PlanError unless 1 <= k <= n."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise PlanError(
            f"K = {k!r} layers cannot be chosen: expected a whole number from 1 to {n}, the number of shared layers."
        )
