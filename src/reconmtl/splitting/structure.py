"""Containers of tensors, that a forward takes, returns or keeps: lists, mappings, named tuples, dataclasses, slices."""

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Value = Any  # whatever a user's forward passes around
ATOMS = frozenset((int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device))
"""Types that hold no tensor."""


def holds_nothing(value: Value) -> bool:
    """Whether a value is a number, string, ... or a tuple of such, as most arguments are; quick."""
    kind = type(value)
    if kind in ATOMS:
        return True
    return kind is tuple and ATOMS.issuperset(map(type, value))


def children(value: Value) -> Sequence[Value] | None:
    """The members of a container, None for anything else."""
    kind = type(value)
    if kind in ATOMS or isinstance(value, (Tensor, str, torch.Size)):
        return None
    if isinstance(value, (list, tuple)):
        return value
    if kind is deque:
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if kind is slice:
        return (value.start, value.stop, value.step)
    if _is_dataclass(value):
        return [getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    return None


def _is_dataclass(value: Value) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tensors(value: Value) -> Iterator[Tensor]:
    """Every tensor in a structure, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    for v in children(value) or ():
        yield from tensors(v)


def rebuild(value: Value, members: Sequence[Value]) -> Value:
    """A container like `value` with other members (in the order of `children`); the same object if none changed."""
    old = children(value)
    if old is None or all(a is b for a, b in zip(old, members, strict=True)):
        return value
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(members)
    if kind is slice:
        return slice(*members)
    if kind is deque:
        return deque(members, value.maxlen)
    if isinstance(value, tuple):  # a named tuple takes its fields, torch.return_types and plain subclasses a sequence
        return kind(*members) if hasattr(value, "_fields") else kind(members)
    if isinstance(value, Mapping):
        return with_items(value, dict(zip(value, members, strict=True)))
    new = copy.copy(value)
    if isinstance(value, list):
        new[:] = members
        return new
    names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    for name, member in zip(names, members, strict=True):
        object.__setattr__(new, name, member)  # also for frozen dataclasses
    return new


def with_items(mapping: Mapping[Value, Value], items: Mapping[Value, Value]) -> Mapping[Value, Value]:
    """A mapping of the same type where that is possible (a dict where it is not) with some items replaced."""
    if type(mapping) is dict:
        return {**mapping, **items}
    try:
        new = copy.copy(mapping)
        for key, item in items.items():
            new[key] = item  # type: ignore[index]
    except (TypeError, NotImplementedError):
        return {**mapping, **items}
    return new


def transform(value: Value, leaf: Callable[[Value], Value]) -> Value:
    """Apply `leaf` to every tensor of a structure."""
    if isinstance(value, Tensor):
        return leaf(value)
    members = children(value)
    if not members:
        return value
    return rebuild(value, [transform(v, leaf) for v in members])
