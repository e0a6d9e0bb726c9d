"""Where a split layer keeps its tensors: in place, one plain child module per group of tasks under `per_task`.

The layer stays the same object at the same place; its class becomes a subclass of its own class, in which the names of
the moved tensors are properties that read the copies. What a layer computes is never computed by itself but by *faces*:
short-lived modules of the original class that hold the tensors of one group. A face knows its tensors for good, so that
work which autograd repeats later (checkpointing) cannot pick up another group's copy.
"""

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import TaskCopies
from reconmtl.splitting.branched import Branched, make, pick
from reconmtl.splitting.conversions import CONVERT, check_asker
from reconmtl.splitting.groups import Family, Masks, MissingTaskError, complete, locate, refine
from reconmtl.splitting.objects import is_object, unpack
from reconmtl.splitting.structure import Value, children

COPIES = "per_task"
RECORD = "_reconmtl"
MANAGED = frozenset(("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs"))
STANDARD = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""


class GroupTensors(nn.Module):
    """The tensors of one layer that belong to one group of tasks."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 as of any module
        check_asker(f"a copy ({COPIES}.<task>)")
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        check_asker(f"a copy ({COPIES}.<task>)")
        super().__delattr__(name)


class Moved(dict[str, nn.Parameter | None]):
    """The `_parameters` of a split layer, without those that its copies hold."""

    def __init__(self, left: dict[str, nn.Parameter | None] | None = None, name: str = "a split layer") -> None:
        super().__init__(left or {})
        self.name = name

    def __missing__(self, key: str) -> None:
        check_asker(self.name)
        raise KeyError(key)


class Copies(TaskCopies):
    """The copies of one layer; nothing but this package puts anything in."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As of any module, once for each name.

        Raises:
            SplitError: When something that converts models walks through, such as SyncBatchNorm's conversion.
        """
        if name in self._modules:
            raise SplitError(
                f"A conversion of modules reached the copies of a split layer and would tear them from it. {CONVERT}"
            )
        super().add_module(name, module)


@dataclass
class Root:
    """What only the outermost module of a split model knows."""

    plan: dict[str, object]
    norm_stats: str
    mode: str
    rehearse: bool = True  # whether first calls are compared with ordinary networks
    learned: bool = False
    rehearsed: set[tuple[bool, bool]] = field(default_factory=set)  # (training, with gradients) of calls that were
    settled: bool = False  # no call moves tensors about any more, so that several threads may call


@dataclass
class Record:
    """What is known about one module of a split model; lives in the module, travels with copies and pickles.

    Attributes:
        family: The tasks.
        name: Dotted name, for messages.
        order: Original names of its own parameters and of its own buffers, None ones included.
        params: Names of parameters with copies, and the groups that have one.
        buffers: The same for buffers.
        owner: The tasks whose outputs this module can reach; all, as long as nothing is known.
        atomic: Whether it runs whole, once per group, on plain tensors.
        stats: Its buffers become per-task where its input is: "always", "watch" (if a call changes them), "never", or
            "constant" (they were watched, and no call changed them).
        kernel: It is one of PyTorch's own leaf modules, which call nothing of the user's.
        held: Names of Python attributes whose value differs between groups.
        noted: What calls for each group left in lists and the like, by attribute, where that differs.
        root: Set for the outermost module.
    """

    family: Family
    name: str
    order: tuple[tuple[str, ...], tuple[str, ...]]
    owner: int
    params: tuple[str, ...] = ()
    param_groups: Masks = ()
    buffers: tuple[str, ...] = ()
    buffer_groups: Masks = ()
    atomic: bool = False
    stats: str = "never"
    kernel: bool = False
    held: set[str] = field(default_factory=set)
    noted: dict[str, "Noted"] = field(default_factory=dict)
    root: Root | None = None

    def partitions(self) -> list[Masks]:
        """The partitions of tasks by which this module's own tensors differ."""
        return [g for g, names in ((self.param_groups, self.params), (self.buffer_groups, self.buffers)) if names]


class PerTask:
    """A Python attribute that differs between groups of tasks, as a module's forward left it."""

    def __init__(self, masks: Masks, values: Sequence[Value]) -> None:
        self.masks, self.values = masks, tuple(values)

    def part(self, mask: int) -> Value:
        """The value of one group."""
        return self.values[locate(self.masks, (mask,))[0]]


@dataclass
class Noted:
    """What a list (or dict, ...) in an attribute was left with, and what the call for each group had left in it."""

    left: Value
    values: dict[int, Value]

    def fits(self, value: Value) -> bool:
        """Whether a collection still holds what it was left with."""
        a, b = value, self.left
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
        if type(a) is not type(b) or len(a) != len(b):
            return False
        if isinstance(a, set):
            return bool(a == b)
        pairs = ((a[k], b.get(k)) for k in a) if isinstance(a, dict) else zip(a, b, strict=True)
        return all(x is y or (not isinstance(x, (Tensor, np.ndarray)) and x == y) for x, y in pairs)


def fill(collection: Value, content: Value) -> None:
    """Give a list, dict, deque, set or array other content."""
    if isinstance(collection, np.ndarray):
        collection[...] = content
        return
    content = copy.copy(content)
    collection.clear()
    (collection.extend if isinstance(collection, (list, deque)) else collection.update)(content)


def record(module: nn.Module) -> Record | None:
    """The record of a module, None for one that split left alone."""
    return cast("Record | None", module.__dict__.get(RECORD))


def copies(module: nn.Module) -> TaskCopies:
    """The container of a module's copies."""
    return cast(TaskCopies, module._modules[COPIES])


# Classes ------------------------------------------------------------------------------------------------------------

_CLASSES: "WeakValueDictionary[tuple[type, type, tuple[str, ...]], type]" = WeakValueDictionary()


def adapted_class(mixin: type, base: type, names: tuple[str, ...]) -> type:
    """The subclass of a module class in which `names` are read from the copies."""
    key = (mixin, base, names)
    known = _CLASSES.get(key)
    if known is None:

        def construct(self: nn.Module, *args: Value, **kwargs: Value) -> None:
            self.__class__ = base  # `type(self)(...)` in a method means the user's class
            base.__init__(self, *args, **kwargs)  # type: ignore[misc]

        def body(namespace: dict[str, Value]) -> None:
            namespace.update({n: property(functools.partial(_read_property, n)) for n in names})
            namespace.update(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
            namespace["_reconmtl_key"] = key
            namespace["__init__"] = construct

        known = types.new_class(base.__name__, (mixin, base), {}, body)
        _CLASSES[key] = known
    return known


def _read_property(name: str, module: nn.Module) -> Value:
    check_asker(cast(Record, record(module)).name)
    return read(module, name)


def set_class(module: nn.Module, mixin: type | None = None) -> None:
    """Give a module the class that its record asks for."""
    rec = cast(Record, record(module))
    old = getattr(type(module), "_reconmtl_key", None)
    mixin, base = (old[0], old[1]) if old else (cast(type, mixin), type(module))
    module.__class__ = adapted_class(mixin, base, (*rec.params, *rec.buffers))


def base_class(module: nn.Module) -> type:
    """The user's class of an adapted module."""
    return cast(type, type(module)._reconmtl_key[1])  # type: ignore[attr-defined]


# Reading and writing ------------------------------------------------------------------------------------------------


def read(module: nn.Module, name: str) -> Value:
    """A split tensor, as a value that holds every group's copy."""
    rec = cast(Record, record(module))
    of, groups = ("_parameters", rec.param_groups) if name in rec.params else ("_buffers", rec.buffer_groups)
    box = copies(module)._modules
    vals = [cast(Value, getattr(box[rec.family.label(m)], of)[name]) for m in groups]
    # No nn.Parameter: another module could register it, and would hold all copies as one (SyncBatchNorm's conversion).
    return make(rec.family, groups, vals)


def write(module: nn.Module, name: str, value: Value) -> None:
    """Assign a split buffer or parameter: each group takes its part."""
    rec = cast(Record, record(module))
    is_param = name in rec.params
    if not isinstance(value, Tensor) or (is_param and not isinstance(value, nn.Parameter)):
        given = "a value that differs between tasks" if type(value) is Branched else type(value).__name__
        raise SplitError(
            f"{rec.name}.{name} has one copy per task and cannot become {given}; assign to the copies in "
            f"`{rec.name}.per_task` instead. If the forward lends the layer other weights (functional_call), name the "
            "module that does so in `split(..., atomic=[...])`, or use mode='loop'."
        )
    groups = rec.param_groups if is_param else rec.buffer_groups
    if not is_param and type(value) is Branched and refine(groups, complete(value.masks, rec.family.full)) != groups:
        refine_buffers(module, refine(groups, complete(value.masks, rec.family.full)))
        groups = rec.buffer_groups
    for i, m in enumerate(groups):
        part = pick(value, m)
        if type(value) is not Branched and i > 0:
            part = clone(part)
        child = copies(module)[rec.family.label(m)]
        (child._parameters if is_param else child._buffers)[name] = part


def clone(tensor: Tensor) -> Tensor:
    """A copy of a parameter or buffer, of its own class and memory format, without gradient history."""
    if isinstance(tensor, nn.Parameter):
        new = copy.copy(tensor) if tensor.is_meta else nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        if type(tensor) is not nn.Parameter:
            new = copy.deepcopy(tensor)
        new.__dict__.update({k: v for k, v in vars(tensor).items() if k not in new.__dict__})
        new.grad = None
        return new
    return tensor.detach().clone()


def split_parameters(module: nn.Module, groups: Masks, *, buffers: bool, memo: dict[tuple[int, int], Tensor]) -> None:
    """Give every own parameter of a module (and every own buffer) one copy per group; the first keeps the object."""
    rec = cast(Record, record(module))
    rec.params = tuple(n for n, p in module._parameters.items() if p is not None)
    rec.param_groups = groups
    _move(module, "_parameters", rec.params, groups, memo)
    module.__dict__["_parameters"] = Moved(module._parameters, rec.name)
    if buffers:
        rec.buffers = tuple(n for n, b in module._buffers.items() if b is not None)
        rec.buffer_groups = groups
        _move(module, "_buffers", rec.buffers, groups, memo)
    if isinstance(module, nn.RNNBase):
        forget_flat_weights(module)
    set_class(module)


def forget_flat_weights(module: nn.RNNBase) -> None:
    """Recurrent modules hold their weights a second time; only faces need that."""
    nothing = [None] * len(module._flat_weights_names)
    module.__dict__.update(_flat_weights=nothing, _flat_weight_refs=list(nothing))


def _move(module: nn.Module, of: str, names: Iterable[str], groups: Masks, memo: dict[tuple[int, int], Tensor]) -> None:
    rec = cast(Record, record(module))
    box = module._modules.setdefault(COPIES, Copies())
    assert isinstance(box, TaskCopies)
    box.train(module.training)
    for name in names:
        tensor = getattr(module, of).pop(name)
        for i, mask in enumerate(groups):
            part = tensor if i == 0 else memo.get((id(tensor), mask))
            if part is None:
                part = memo[id(tensor), mask] = clone(tensor)
            _store(box, rec.family.label(mask), of, name, part, name not in module._non_persistent_buffers_set)


def _store(box: TaskCopies, label: str, of: str, name: str, tensor: Tensor, persistent: bool) -> None:
    if label not in box:
        box[label] = GroupTensors().train(box.training)
    child = box[label]
    if of == "_parameters":
        child.register_parameter(name, cast(nn.Parameter, tensor))
    else:
        child.register_buffer(name, tensor, persistent=persistent)


def refine_buffers(module: nn.Module, groups: Masks) -> None:
    """Give every own buffer of a module one copy per group; later groups start from a copy of what they shared.

    Args:
        module: Any adapted module with buffers.
        groups: A refinement of the groups it has.
    """
    with torch.inference_mode(False):  # the first call may be an inference; later ones may train
        _refine_buffers(module, groups)


def _refine_buffers(module: nn.Module, groups: Masks) -> None:
    rec = cast(Record, record(module))
    if not rec.buffers:
        rec.buffers = tuple(n for n, b in module._buffers.items() if b is not None)
        rec.buffer_groups = (rec.family.full,)
        _move(module, "_buffers", rec.buffers, rec.buffer_groups, {})
    box, old = copies(module), rec.buffer_groups
    held = {m: {n: box[rec.family.label(m)]._buffers.pop(n) for n in rec.buffers} for m in old}
    for m in old:
        label = rec.family.label(m)
        if m not in groups and not box[label]._parameters:
            del box[label]
    used: set[int] = set()
    for m in groups:
        source = old[locate(old, (m,))[0]]
        for n in rec.buffers:
            tensor = cast(Tensor, held[source][n])
            if id(tensor) in used:
                tensor = clone(tensor)
            used.add(id(tensor))
            _store(box, rec.family.label(m), "_buffers", n, tensor, n not in module._non_persistent_buffers_set)
    rec.buffer_groups = groups
    set_class(module)


def share_buffers(module: nn.Module) -> None:
    """Undo `refine_buffers` for buffers that turned out to be constant."""
    rec = cast(Record, record(module))
    box = copies(module)
    for i, mask in enumerate(rec.buffer_groups):
        label = rec.family.label(mask)
        for n in rec.buffers:
            tensor = box[label]._buffers.pop(n)
            if i == 0:
                module._buffers[n] = tensor
        if not box[label]._parameters:
            del box[label]
    if not len(box):
        del module._modules[COPIES]
    rec.buffers, rec.buffer_groups = (), ()
    set_class(module)


def own_tensors(module: nn.Module, rec: Record, mask: int) -> tuple[dict[str, Value], dict[str, Value]]:
    """The parameters and buffers of a module as one group sees them, in their original order."""
    out = []
    for of, names, groups, order in (
        ("_parameters", rec.params, rec.param_groups, rec.order[0]),
        ("_buffers", rec.buffers, rec.buffer_groups, rec.order[1]),
    ):
        shared = module.__dict__[of]
        if not names:
            out.append(shared)
            continue
        label = rec.family.label(groups[locate(groups, (mask,))[0]])
        mine = copies(module)._modules[label].__dict__[of]
        if not shared:  # everything was moved
            out.append(mine)
            continue
        both = {n: mine[n] if n in mine else shared.get(n) for n in order}
        both.update({n: v for n, v in shared.items() if n not in both})
        out.append(both)
    return out[0], out[1]


# The original classes -------------------------------------------------------------------------------------------------


def to_plain(model: nn.Module, mask: int) -> None:
    """Turn a (copied) tree back into its original classes, with the tensors of one group of tasks, in place."""
    for module in list(model.modules()):
        rec, d = record(module), module.__dict__
        for name in [n for n in d if n not in MANAGED and n not in STANDARD]:
            if type(d[name]) is PerTask or any(type(t) is Branched for t in _tensors_in(d[name], 0)):
                d[name] = _settled(d[name], mask)
        if rec is None:
            continue
        for name, noted in rec.noted.items():
            if name in d and mask and noted.fits(d[name]):
                fill(d[name], next((v for m, v in noted.values.items() if m & mask == mask), d[name]))
        params, buffers = own_tensors(module, rec, mask)
        d["_parameters"], d["_buffers"] = params, buffers
        d["_modules"].pop(COPIES, None)
        if rec.params and "_flat_weights" in d:
            weights = [params.get(n) for n in d["_flat_weights_names"]]
            d.update(_flat_weights=weights, _flat_weight_refs=[w if w is None else weakref.ref(w) for w in weights])
        del d[RECORD]
        module.__class__ = base_class(module)


def _settled(value: Value, mask: int) -> Value:
    """What an earlier call left in an attribute, as one group sees it; lists and the like stay the same objects."""
    if isinstance(value, PerTask):
        return value.part(mask)
    if type(value) is Branched:
        return value.part(mask) if any(m & mask == mask for m in value.masks) else value.vals[0]  # only others need it
    if type(value) in (list, dict, deque):
        for key, member in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _settled(member, mask)
            if new is not member:
                value[key] = new
        return value
    try:
        return unpack(value, mask)
    except MissingTaskError:
        return value


def plain_tensors(model: nn.Module) -> Iterable[tuple[nn.Module, str, Tensor]]:
    """Tensors that modules hold in attributes (also inside lists, objects, ...): (module, attribute, tensor)."""
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name not in MANAGED and name not in STANDARD:
                for t in _tensors_in(value, 0):
                    yield module, name, t


def _tensors_in(value: Any, depth: int) -> Iterable[Tensor]:  # noqa: ANN401 any attribute
    if isinstance(value, Tensor):
        yield value
    elif depth < 4 and not isinstance(value, nn.Module):
        for v in children(value) or _held_by(value):
            yield from _tensors_in(v, depth + 1)


def _held_by(value: Value) -> Iterable[Value]:
    """What is inside of things that are no containers of tensors: partial functions, closures, objects, deques."""
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.FunctionType):
        return [v for c in value.__closure__ or () for v in _content(c)] + list(value.__defaults__ or ())
    if isinstance(value, (deque, set, frozenset)):
        return list(value)
    return list(value.__dict__.values()) if is_object(value) else ()


def _content(cell: types.CellType) -> list[Value]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a name that is not assigned yet
        return []
