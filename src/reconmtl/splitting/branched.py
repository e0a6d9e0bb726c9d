"""Branched values: a tensor that holds one tensor per group of tasks that still agree.

Ordinary Python code computes with it: `__torch_function__` maps every call over the branches. Values that are not
branched are valid for all tasks and computed once; values that exist for some tasks only (behind a head) stay so, and
what meets them is computed for these tasks alone.

Python values are taken from all branches and have to agree; nothing that bypasses `__torch_function__` (a custom
autograd Function, a C++ extension, vmap) can see a branched value without an error.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from reconmtl.errors import SplitError
from reconmtl.splitting.functions import name_of
from reconmtl.splitting.groups import Family, Masks, MissingTaskError, locate, refine, union
from reconmtl.splitting.structure import Value, children, holds_nothing, rebuild

_C = torch._C
WAYS_OUT = (
    "Name the module in `split(..., atomic=[...])`, so that it runs once per branch on plain tensors, "
    "or use mode='loop'."
)


_NOWHERE = torch.device("meta")
"""The device of wrappers, as C++ sees it: of another kind than any value's, so that `x.data = wrapper` fails."""


class Branched(Tensor):
    """One tensor per group of tasks; made by `make`."""

    family: Family
    masks: Masks
    vals: tuple[Tensor, ...]
    mapped: ClassVar[Callable[..., Value]]  # set by `mapping`, which builds on this file

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Value],
        types: object,
        args: Sequence[Value] = (),
        kwargs: dict[str, Value] | None = None,
    ) -> Value:
        """Map a call over the branches."""
        return cls.mapped(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, _: object = (), args: Sequence[Value] = (), __: object = None
    ) -> Value:
        """Only C++ that bypasses `__torch_function__` gets here."""
        if func is torch.ops.aten.detach.default:  # autograd hands out what checkpointing has kept
            return make(args[0].family, args[0].masks, args[0].vals)
        raise SplitError(
            f"{func} reached a value that differs between tasks in a way that hides the tasks from reconmtl "
            f"(a C++ extension, vmap, or a custom autograd Function). {WAYS_OUT}"
        )

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _: object) -> None:  # what `nn.Parameter(x)` ends with
        raise SplitError(
            "nn.Parameter(x) of a value that differs between tasks would cut it off from what it was computed from "
            f"(as slices of an nn.ParameterList do: loop over its items instead). {WAYS_OUT}"
        )

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        parts = ", ".join(
            f"{self.family.label(m)}: {tuple(v.shape)}" for m, v in zip(self.masks, self.vals, strict=True)
        )
        return f"Branched({parts}, dtype={self.vals[0].dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    def __iter__(self) -> Iterator[Value]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Value]) -> Value:
        from copy import deepcopy

        return make(self.family, self.masks, tuple(deepcopy(v, memo) for v in self.vals))

    def __reduce_ex__(self, _: object) -> Value:
        return make, (self.family, self.masks, self.vals)

    def part(self, mask: int) -> Tensor:
        """The tensor of one task or group of tasks that agree."""
        for m, v in zip(self.masks, self.vals, strict=True):
            if m & mask == mask:
                return v
        raise missing(self, mask)


def make(family: Family, masks: Masks, vals: Sequence[Tensor]) -> Branched:
    """Wrap one tensor per group of tasks."""
    v = vals[0]
    try:
        shape = v.shape
    except RuntimeError:  # nested tensors have none
        shape = torch.Size(())
    needs = False
    for x in vals:
        if x.requires_grad:
            needs = True
            break
    out = Tensor._make_wrapper_subclass(Branched, shape, dtype=v.dtype, device=_NOWHERE, requires_grad=needs)
    out.family, out.masks, out.vals = family, masks, tuple(vals)
    return out


def missing(value: Branched, mask: int) -> MissingTaskError:
    """The error for a task that a value does not exist for."""
    have, want = value.family.names(union(value.masks)), value.family.names(mask & ~union(value.masks))
    return MissingTaskError(
        f"A value that was found to matter for {tasks_text(have)} alone is needed for {tasks_text(want)}. The forward "
        "takes another path than in the call from which this was learned; call the model again (it now computes every "
        "value for every task), or use mode='loop'."
    )


def tasks_text(names: Sequence[str]) -> str:
    """Task names as they stand in messages."""
    return ("task " if len(names) == 1 else "tasks ") + ", ".join(repr(n) for n in names)


# Which values take part in a call -----------------------------------------------------------------------------------


def collect(value: Value, found: list[Branched]) -> None:
    """Append the branched values in a structure to `found`."""
    if type(value) is Branched:
        found.append(value)
        return
    for v in children(value) or ():
        collect(v, found)


def pick(value: Value, mask: int) -> Value:
    """The structure as one group of tasks sees it."""
    if type(value) is Branched:
        return value.part(mask)
    members = children(value)
    if not members:
        return value
    return rebuild(value, [pick(v, mask) for v in members])


def gather(args: Sequence[Value], kwargs: dict[str, Value]) -> list[Branched]:
    """The branched values among a call's arguments."""
    found: list[Branched] = []
    for a in args:
        if type(a) is Branched:
            found.append(a)
        elif not holds_nothing(a):
            collect(a, found)
    for a in kwargs.values():
        if not holds_nothing(a):
            collect(a, found)
    return found


def spread(
    args: Sequence[Value], kwargs: dict[str, Value], masks: Masks
) -> list[tuple[Sequence[Value], dict[str, Value]]]:
    """The arguments of a call as each group of tasks sees them."""
    n = len(masks)
    rows: list[Sequence[Value]] = list(zip(*[_column(a, masks, n) for a in args], strict=True)) if args else [()] * n
    if not kwargs:
        return [(row, kwargs) for row in rows]
    columns = {k: _column(a, masks, n) for k, a in kwargs.items()}
    return [(row, {k: c[i] for k, c in columns.items()}) for i, row in enumerate(rows)]


def _column(value: Value, masks: Masks, n: int) -> Sequence[Value]:
    kind = type(value)
    if kind is Branched:
        return value.vals if value.masks == masks else [value.vals[i] for i in locate(value.masks, masks)]
    if holds_nothing(value) or isinstance(value, Tensor):
        return (value,) * n
    return [pick(value, m) for m in masks]


def meet(found: Sequence[Branched], what: str, *partitions: Masks) -> Masks:
    """The groups for which something has to be computed that takes these values."""
    first = found[0]
    masks = refine(*dict.fromkeys([b.masks for b in found]), *partitions)
    if len(found) > 1 and any(b.family is not first.family and b.family != first.family for b in found):
        raise SplitError(f"{what}: values of two different split models meet. Split the outer model instead.")
    if not masks:
        owners = " and ".join(dict.fromkeys(tasks_text(b.family.names(union(b.masks))) for b in found))
        raise MissingTaskError(
            f"{what} combines values that were found to matter for {owners} alone. The forward takes another path than "
            "in the call from which this was learned; call the model again, or use mode='loop'."
        )
    return masks


def check_untouched(found: Sequence[Branched]) -> None:
    """Refuse values that went through a custom autograd Function as a whole: their gradient would be lost."""
    with _C.DisableTorchFunctionSubclass():
        for b in found:
            if b.grad_fn is not None:
                raise SplitError(
                    f"A value that differs between tasks has been through {b.grad_fn.name()}, a custom autograd "
                    "Function (or re-entrant checkpointing, a full backward hook, FSDP around a block after the "
                    "split), which cannot see the tasks; its gradient would be lost. Checkpoint with "
                    "use_reentrant=False; shard only what comes before the split, or the whole model. "
                    f"{WAYS_OUT}"
                )


# Putting results together -----------------------------------------------------------------------------------------


def combine(results: Sequence[Value], masks: Masks, family: Family, func: Callable[..., Value] | str) -> Value:
    """One value out of one per group: branched where tensors differ, shared where all are the same object.

    Raises:
        SplitError: If Python values differ between groups.
    """
    first = results[0]
    if isinstance(first, Tensor):
        if not all(isinstance(r, Tensor) for r in results):
            raise differs(func, masks, family, results)
        vals = [r.part(m) if type(r) is Branched else r for r, m in zip(results, masks, strict=True)]
        if all(v is vals[0] for v in vals) and union(masks) == family.full:
            return vals[0]
        return make(family, masks, vals)
    members = children(first)
    if members is None:
        if len(results) > 1 and not all(_agree(first, r) for r in results[1:]):
            raise differs(func, masks, family, results)
        if union(masks) != family.full and isinstance(first, (bool, int, float, complex)) and not isinstance(func, str):
            raise MissingTaskError(
                f"{name_of(func)} takes a Python value from a tensor that exists for "
                f"{tasks_text(family.names(union(masks)))} alone; what is done with it cannot be followed. Keep it a "
                "tensor, or use mode='loop'."
            )
        return first
    if all(r is first for r in results) and union(masks) == family.full:  # also what holds itself
        return first
    every = [children(r) for r in results]
    if any(
        type(r) is not type(first) or m is None or len(m) != len(members) for r, m in zip(results, every, strict=True)
    ):
        raise differs(func, masks, family, results)
    if isinstance(first, dict) and any(list(r) != list(first) for r in results):
        raise differs(func, masks, family, results)
    columns = zip(*(m for m in every if m is not None), strict=True)
    return rebuild(first, [combine(column, masks, family, func) for column in columns])


def _agree(a: Value, b: Value) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def differs(func: Callable[..., Value] | str, masks: Masks, family: Family, results: Sequence[Value]) -> SplitError:
    """The error for Python values that depend on the task."""
    name = func if isinstance(func, str) else name_of(func)
    shown = "; ".join(f"{family.label(m)}: {str(r)[:60]}" for m, r in zip(masks, results, strict=True))
    return SplitError(
        f"{name} gives Python values that differ between tasks ({shown}), so that what follows would depend on the "
        f"task. Keep it a tensor (torch.where instead of `if`). {WAYS_OUT}"
    )
