"""Objects that are no containers but hold tensors and are handed around, such as the key-value caches of decoders."""

import types
from collections.abc import Iterator

from torch import Tensor, nn

from reconmtl.splitting.branched import Branched, pick
from reconmtl.splitting.structure import ATOMS, Value, children, rebuild

_OPAQUE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)

DEPTH = 8
"""How far objects are followed: a cache holds a list of layers, which hold tensors."""


def is_object(value: Value) -> bool:
    """Whether a value is neither tensor, container, module nor function, but has attributes."""
    if type(value) in ATOMS or isinstance(value, _OPAQUE):
        return False
    return children(value) is None and bool(getattr(value, "__dict__", None))


def find(value: Value) -> Iterator[tuple[Tensor, Value]]:
    """Every tensor inside of objects in a structure, with the outermost object that holds it."""
    yield from _find(value, None, {}, 0)


def _find(value: Value, holder: Value, seen: dict[int, Value], depth: int) -> Iterator[tuple[Tensor, Value]]:
    if type(value) in ATOMS or id(value) in seen or depth > DEPTH:
        return
    if isinstance(value, Tensor):
        if holder is not None:
            seen[id(value)] = value
            yield value, holder
        return
    members = children(value)
    if members is None and is_object(value):
        seen[id(value)] = value
        holder = value if holder is None else holder
        members = list(value.__dict__.values())
    for v in members or ():
        yield from _find(v, holder, seen, depth + 1)


def holds_branches(value: Value) -> bool:
    """Whether an object in a structure holds a value that differs between tasks."""
    return any(type(t) is Branched for t, _ in find(value))


def unpack(value: Value, mask: int, made: dict[int, Value] | None = None) -> Value:
    """As `pick`, also inside of objects: those that hold values which differ between tasks are copied for each task."""
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Tensor):
        return pick(value, mask)
    members = children(value)
    if members:
        return rebuild(value, [unpack(v, mask, made) for v in members])
    if not is_object(value) or not holds_branches(value):
        return value
    new = made[id(value)] = object.__new__(type(value))
    new.__dict__.update({k: unpack(v, mask, made) for k, v in value.__dict__.items()})
    return new


def same_versions(before: list[tuple[Value, Tensor, int]], after: list[tuple[Value, Tensor, int]]) -> bool:
    """Whether objects hold the same tensors as before, none of them written to."""
    return len(after) == len(before) and all(a[1] is b[1] and a[2] == b[2] for a, b in zip(after, before, strict=True))


def versions(value: Value) -> list[tuple[Value, Tensor, int]]:
    """The tensors inside of objects in a structure, with the object and how often each was written to."""
    out = []
    for t, holder in find(value):
        parts = t.vals if type(t) is Branched else (t,)
        out += [(holder, v, 0 if v.is_inference() else v._version) for v in parts]
    return out
