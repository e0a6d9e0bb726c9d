"""Faces: a module of a split model as one group of tasks sees it, in its original classes, for one call."""

import copy
import types
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import cast

import numpy as np
from torch import nn

from reconmtl.errors import SplitError
from reconmtl.layers import TaskCopies
from reconmtl.splitting.branched import Branched, combine, pick
from reconmtl.splitting.groups import Family, Masks, locate
from reconmtl.splitting.objects import DEPTH
from reconmtl.splitting.storage import (
    COPIES,
    MANAGED,
    RECORD,
    STANDARD,
    Noted,
    PerTask,
    Record,
    base_class,
    copies,
    fill,
    own_tensors,
    read,
    record,
)
from reconmtl.splitting.structure import Value, children


class Face:
    """A module (with what is below it) as one group of tasks sees it, in its original classes.

    Shares every tensor, hook and attribute; lives for one call. `finish` carries over what the call assigned.
    """

    def __init__(self, module: nn.Module, mask: int) -> None:
        self.mask = mask
        self.made: dict[int, tuple[nn.Module, nn.Module, dict[str, Value]]] = {}
        self.rebound: list[tuple[nn.Module, str, Value, Noted]] = []
        if len(module._modules) <= (COPIES in module._modules):
            self.module = self._one(module)
        else:
            inside = _with_records(module)
            self.module = self._tree(module, inside)
            for original, face, d in self.made.values():
                for key, value in list(d.items()):
                    if key not in MANAGED:
                        d[key] = new = _rebind(value, self.made)
                        if new is not value and type(new) in (list, dict):
                            self.rebound.append((original, key, new, Noted(copy.copy(new), {})))
                face.__dict__.update(d)
                self.made[id(original)] = (original, face, {**d, "_modules": dict(d["_modules"])})

    def _one(self, module: nn.Module) -> nn.Module:
        rec = record(module)
        d = dict(module.__dict__)
        d.pop("_compiled_call_impl", None)  # compiled for the module itself, not for a face
        if rec is None:
            base = type(module)
        else:
            base = base_class(module)
            del d[RECORD]
            d["_parameters"], d["_buffers"] = own_tensors(module, rec, self.mask)
            if rec.params and "_flat_weights" in d:
                weights = [d["_parameters"].get(n) for n in d["_flat_weights_names"]]
                d.update(_flat_weights=weights, _flat_weight_refs=[w if w is None else weakref.ref(w) for w in weights])
            for name in tuple(rec.held):
                d[name] = d[name].part(self.mask) if isinstance(d[name], PerTask) else pick(d[name], self.mask)
            if COPIES in d["_modules"]:
                d["_modules"] = {k: v for k, v in d["_modules"].items() if k != COPIES}
        face = object.__new__(base)
        face.__dict__.update(d)
        self.made[id(module)] = (module, face, d)
        return face

    def _tree(self, module: nn.Module, inside: set[int]) -> nn.Module:
        if id(module) in self.made:
            return self.made[id(module)][1]
        if id(module) not in inside:
            return module
        face = self._one(module)
        below = {k: m if m is None else self._tree(m, inside) for k, m in face._modules.items()}
        face.__dict__["_modules"] = self.made[id(module)][2]["_modules"] = below
        return face

    def changes(self) -> list[tuple[nn.Module, dict[str, Value]]]:
        """What the call assigned to Python attributes; buffers that it replaced are stored where they belong."""
        out = []
        for original, key, value, before_call in self.rebound:
            if not before_call.fits(value):
                raise SplitError(
                    f"{type(original).__name__} writes into {key!r}, a {type(value).__name__} that also holds modules "
                    "and exists once for each task while they are called. Keep values in an attribute of their own."
                )
        for original, face, before in self.made.values():
            after = face.__dict__
            rec = record(original)
            self._check_modules(original, after["_modules"], before["_modules"])
            if rec is not None and rec.buffers:
                self._keep_buffers(original, rec, after["_buffers"])
            if len(after) == len(before) and all(map(is_, after.values(), before.values())):
                continue
            new = {k: v for k, v in after.items() if k not in MANAGED and (k not in before or before[k] is not v)}
            if new:
                out.append((original, new))
        return out

    def _check_modules(self, original: nn.Module, after: dict[str, Value], before: dict[str, Value]) -> None:
        if after is not before and (len(after) != len(before) or any(before.get(k) is not m for k, m in after.items())):
            raise SplitError(
                f"{type(original).__name__} replaces or adds modules in its forward, which a call for one group of "
                "tasks cannot do for the others. Keep them where they are (in a list, by an index in an attribute)."
            )

    def _keep_buffers(self, original: nn.Module, rec: Record, after: dict[str, Value]) -> None:
        label = rec.family.label(rec.buffer_groups[locate(rec.buffer_groups, (self.mask,))[0]])
        mine = copies(original)._modules[label].__dict__["_buffers"]
        for n in rec.buffers:
            if after[n] is not mine[n]:
                mine[n] = after[n]


@contextmanager
def opened(module: nn.Module) -> Iterator[nn.Module]:
    """A container as its forward expects it: branched parameters, and children that are all its own.

    For modules that own split parameters and iterate over their children, among which the copies would come up.
    """
    rec = cast(Record, record(module))
    d = dict(module.__dict__)
    del d[RECORD]
    d["_parameters"] = {n: read(module, n) if n in rec.params else d["_parameters"].get(n) for n in rec.order[0]}
    d["_buffers"] = {n: read(module, n) if n in rec.buffers else d["_buffers"].get(n) for n in rec.order[1]}
    d["_modules"] = {k: v for k, v in d["_modules"].items() if k != COPIES}
    before = dict(d["_buffers"])
    face: nn.Module = object.__new__(base_class(module))
    face.__dict__.update(d)
    yield face
    for name, value in face._buffers.items():
        if before.get(name) is not value:
            setattr(module, name, value)
    for key, value in face.__dict__.items():
        if key not in MANAGED and (key not in d or d[key] is not value):
            module.__dict__[key] = value


def keep_attributes(faces: Sequence[Face], masks: Masks, family: Family) -> None:
    """Store what the calls of all faces assigned: shared if equal, else per group."""
    changes = [f.changes() for f in faces]
    if not any(changes):
        return
    by_module: dict[int, tuple[nn.Module, set[str]]] = {}
    assigned: dict[tuple[int, int], dict[str, Value]] = {}
    for i, change in enumerate(changes):
        for module, new in change:
            by_module.setdefault(id(module), (module, set()))[1].update(new)
            assigned[id(module), i] = new
    for key, (module, names) in by_module.items():
        rec = record(module)
        for name in sorted(names):
            values = [assigned.get((key, i), {}).get(name, module.__dict__.get(name)) for i in range(len(faces))]
            try:
                merged = combine(values, masks, family, f"attribute {name!r}")
            except SplitError:
                merged = PerTask(masks, values)
            module.__dict__[name] = merged
            if rec is not None and (isinstance(merged, PerTask) or _holds_branches(merged)):
                rec.held.add(name)


class Collections:
    """Lists, dicts and the like in attributes at or below a module: each call starts with what they held.

    They stay the same objects, so that others who hold them (a loss that sums up what layers noted) see the same.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        self.where = where
        below = module.modules() if module._modules else (module,)
        self.held = [(record(m), name, v) for m in below for name, v in _collections(m)]
        self.start = [copy.copy(v) for _, _, v in self.held]
        self.ends: list[list[Value]] = []

    def begin(self, mask: int) -> None:
        """Put back what they held, as one group of tasks sees it."""
        for (rec, name, v), start in zip(self.held, self.start, strict=True):
            noted = rec.noted.get(name) if rec is not None else None
            if noted is not None and mask in noted.values and noted.fits(start):
                fill(v, noted.values[mask])
            elif _holds_branches(start):
                fill(v, pick(start, mask))
            elif self.ends:
                fill(v, start)

    def end(self) -> None:
        """Note what the call left in them."""
        self.ends.append([copy.copy(v) for _, _, v in self.held])

    def merge(self, masks: Masks, family: Family, *, outermost: bool) -> None:
        """Fill them with what all calls left, one entry for all groups.

        Numbers noted by whole networks may differ: the last one's are to be seen, and each goes on from its own.
        """
        for (rec, name, v), *ends in zip(self.held, *self.ends, strict=True):
            try:
                fill(v, combine(ends, masks, family, f"what {self.where} noted in a {type(v).__name__}"))
                if rec is not None:
                    rec.noted.pop(name, None)
            except SplitError:
                if not outermost or rec is None:
                    raise
                rec.noted[name] = Noted(copy.copy(v), dict(zip(masks, ends, strict=True)))


def _collections(module: nn.Module) -> list[tuple[str, Value]]:
    rec = record(module)
    kind = type(module) if rec is None else base_class(module)
    if kind.__module__.startswith("torch.nn."):
        return []
    return [(k, v) for k, v in module.__dict__.items() if type(v) in _KINDS and k not in STANDARD]


_KINDS = (list, dict, deque, set, np.ndarray)


def _holds_branches(value: Value, depth: int = 0) -> bool:
    if type(value) is Branched:
        return True
    return depth < DEPTH and any(_holds_branches(v, depth + 1) for v in children(value) or ())


def _with_records(module: nn.Module) -> set[int]:
    """Ids of the modules at or above an adapted one."""
    inside: set[int] = set()

    def visit(m: nn.Module) -> bool:
        found = record(m) is not None
        for child in m._modules.values():
            if child is not None and not isinstance(child, TaskCopies):
                found = visit(child) or found
        if found:
            inside.add(id(m))
        return found

    visit(module)
    return inside


def _rebind(value: Value, made: dict[int, tuple[nn.Module, nn.Module, dict[str, Value]]], depth: int = 0) -> Value:
    """Point references to modules (in attributes, lists, dicts, bound methods) at their faces."""
    if isinstance(value, nn.Module):
        return made[id(value)][1] if id(value) in made else value
    if type(value) in (list, tuple) and depth < DEPTH:
        new = [_rebind(v, made, depth + 1) for v in value]
        return value if all(a is b for a, b in zip(new, value, strict=True)) else type(value)(new)
    if type(value) is dict and depth < DEPTH:
        items = {k: _rebind(v, made, depth + 1) for k, v in value.items()}
        return value if all(items[k] is v for k, v in value.items()) else items
    if isinstance(value, types.MethodType) and id(value.__self__) in made:
        return types.MethodType(value.__func__, made[id(value.__self__)][1])
    return value
