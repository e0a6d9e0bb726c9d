"""How calls of PyTorch functions are mapped over branches: one by one, in place, and by rules of their own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reconmtl.errors import SplitError
from reconmtl.splitting.branched import (
    WAYS_OUT,
    Branched,
    check_untouched,
    combine,
    differs,
    gather,
    make,
    meet,
    spread,
)
from reconmtl.splitting.functions import METADATA, getters, name_of, targets, writes
from reconmtl.splitting.groups import Masks, refine
from reconmtl.splitting.stale import retire, shares_memory
from reconmtl.splitting.structure import Value

_C = torch._C


class SharedWriteError(SplitError, TypeError):
    """Per-task values written in place into a shared tensor.

    A TypeError, because that is how CPython learns that `shared += branched` has no in-place form: it then computes
    `shared = shared + branched`, which is what the user means. An explicit `shared.add_(branched)` shows the message.
    """

    target: Tensor | None = None


def run(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    """Call `func` once per group of tasks and combine what comes back."""
    found = gather(args, kwargs)
    if torch.is_grad_enabled():
        check_untouched(found)
    first = found[0]
    masks = first.masks
    for b in found:
        if b.masks != masks:
            masks = meet(found, name_of(func))
            break
    if writes(func) or (kwargs and (kwargs.get("inplace") or kwargs.get("out") is not None)):
        changed = targets(func, args, kwargs)
        if changed:
            return _write(func, args, kwargs, found, masks, changed)
    try:
        shared = [
            (a, a._version) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and type(a) is not Branched
        ]
    except RuntimeError:  # inference tensors do not count writes
        shared = []
    results = [func(*a, **k) for a, k in spread(args, kwargs, masks)]
    for a, version in shared:
        if a._version != version:  # a kernel that does not say so in its name or schema
            raise _shared_write(name_of(func), first)
    r = results[0]
    if isinstance(r, Tensor):
        same = True
        for other in results:
            same = same and other is r
            if not isinstance(other, Tensor):
                raise differs(func, masks, first.family, results)
        if not same or len(results) == 1:
            return make(first.family, masks, results)
    return combine(results, masks, first.family, func)


# Writing in place ---------------------------------------------------------------------------------------------------


def _write(
    func: Callable[..., Value],
    args: Sequence[Value],
    kwargs: dict[str, Value],
    found: Sequence[Branched],
    masks: Masks,
    changed: Sequence[Value],
) -> Value:
    name = name_of(func)
    for t in changed:
        if type(t) is not Branched:
            raise _refused(name, t, found[0], args)
        if t.masks != masks:  # one branch of the target would have to take different values, or values are missing
            raise _refused(name, t, t, args)
        if len(masks) > 1:
            _check_memory(name, t)
    setter = getattr(func, "__name__", "") == "__set__"
    results = []
    for values, keywords in spread(args, kwargs, masks):
        if setter and len(masks) > 1 and isinstance(values[1], Tensor) and type(args[1]) is not Branched:
            values = (values[0], values[1].clone())  # or all copies would share the assigned memory
        results.append(func(*values, **keywords))
    for t in changed:
        with _C.DisableTorchFunctionSubclass():
            if not t.requires_grad and any(v.requires_grad for v in t.vals):
                t.requires_grad_(True)
    for t in changed:
        if all(r is v for r, v in zip(results, t.vals, strict=True)):
            return t
    return combine(results, masks, found[0].family, func)


def _refused(name: str, target: Value, value: Branched, args: Sequence[Value]) -> SplitError:
    """The error for a write into a shared tensor, which others must not go on using if Python makes it `x = x + y`."""
    error = _shared_write(name, value)
    if len(args) != 2 or args[0] is not target or type(target) not in (Tensor, Branched):
        return error
    if any(shares_memory(v) for v in (target.vals if type(target) is Branched else (target,))):
        return SplitError(f"{error} (Its memory is in use elsewhere too: through a view, or for the backward.)")
    retire(target, args[1])
    error.target = target
    return error


def _shared_write(name: str, value: Branched) -> SharedWriteError:
    return SharedWriteError(
        f"{name} writes values that differ between tasks ({', '.join(value.family.label(m) for m in value.masks)}) in "
        "place into a tensor that these tasks share. Write `x = x + y` instead of `x.add_(y)`, or clone the tensor "
        f"first. {WAYS_OUT}"
    )


def _check_memory(name: str, target: Branched) -> None:
    try:
        memory = {v.untyped_storage()._cdata for v in target.vals}
    except (RuntimeError, NotImplementedError):  # functorch's and sparse tensors have no storage to compare
        return
    if len(memory) < len(target.vals):
        raise SplitError(
            f"{name} changes a value in place whose branches share memory ({target!r}, a view of a shared tensor): one "
            f"task's change would reach the others. Clone it first, or compute out of place. {WAYS_OUT}"
        )


# Functions with a rule of their own ---------------------------------------------------------------------------------


def _metadata(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    value = args[0]
    if type(value) is not Branched:
        return run(func, args, kwargs)
    first = func(value.vals[0], *args[1:], **kwargs)
    for v in value.vals[1:]:
        if func(v, *args[1:], **kwargs) != first:
            results = [func(v, *args[1:], **kwargs) for v in value.vals]
            raise differs(func, value.masks, value.family, results)
    return first


def _needs_grad(_: Callable[..., Value], args: Sequence[Value], __: dict[str, Value]) -> bool:
    return any(v.requires_grad for v in args[0].vals)


class _Handles:
    """Removes the hooks of all branches."""

    def __init__(self, handles: Sequence[Value]) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Remove every one of them."""
        for h in self.handles:
            h.remove()


def _hook(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    return _Handles([func(v, *args[1:], **kwargs) for v in args[0].vals])


_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias", "training")
_STATISTICS_OF_KERNELS = ("input", "weight", "bias", "running_mean", "running_var", "training")
_KERNELS: list[Callable[..., Value]] = [
    kernel
    for name in ("batch_norm", "native_batch_norm", "instance_norm")
    for packet in [getattr(torch.ops.aten, name)]
    for kernel in (getattr(torch, name), packet, packet.default)
]
"""Kernels that write running statistics, although neither name nor schema nor version counter says so."""


def _statistics(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    """Batch normalisation called as a function: shared running statistics cannot be updated from here."""
    names = _STATISTICS if func in (F.batch_norm, F.instance_norm) else _STATISTICS_OF_KERNELS
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, mean = given.get("input"), given.get("running_mean")
    updates = given.get("training", given.get("use_input_stats", "instance" in name_of(func)))
    shared = type(mean) is not Branched or (type(x) is Branched and refine(x.masks, mean.masks) != mean.masks)
    if updates and mean is not None and shared and type(x) is Branched:
        raise SplitError(
            f"{name_of(func)} updates running statistics that all tasks share with values that differ between tasks, "
            f"outside a normalisation layer's own call. {WAYS_OUT}"
        )
    return run(func, args, kwargs)


def _gradient(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    """torch.autograd.grad inside a forward: branches may share graph, which has to outlive all but the last."""
    return run(func, args, {**kwargs, "retain_graph": True})


_RULES: dict[Callable[..., Value], Callable[..., Value]] = {
    **dict.fromkeys(METADATA, _metadata),
    **dict.fromkeys(getters("requires_grad"), _needs_grad),
    **dict.fromkeys([Tensor.register_hook, Tensor.register_post_accumulate_grad_hook], _hook),
    **dict.fromkeys([F.batch_norm, F.instance_norm, *_KERNELS], _statistics),
    torch.autograd.grad: _gradient,
}


def dispatch(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    """Any call that takes a branched value."""
    rule = _RULES.get(func)
    return rule(func, args, kwargs) if rule is not None else run(func, args, kwargs)


Branched.mapped = staticmethod(dispatch)
