"""Tensors that `shared += per_task` has replaced under one name, while others may still hold them.

In an ordinary network `x += y` changes what every name for `x` means. Here `x` becomes a new, branched value, which
only the name in the statement gets. The old tensor therefore refuses to be computed with; what shares its memory
(views, and what it is a view of) cannot be told, so that the statement itself is refused while there is any.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reconmtl.errors import SplitError
from reconmtl.splitting.functions import METADATA, name_of
from reconmtl.splitting.structure import Value

_ALLOWED = frozenset(METADATA)
_STATE = "_reconmtl_stale"
_NOBODY = object()
_count_users = getattr(torch._C, "_storage_Use_Count", None)


class Stale(Tensor):
    """What a tensor's class is from `x += y` on; see `retire`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Value], _: object, args: Sequence[Value] = (), kwargs: dict[str, Value] | None = None
    ) -> Value:
        """Allow what does not read values, and the `x + y` by which Python computes a refused `x += y`."""
        kwargs = kwargs or {}
        if func in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if len(args) == 2 and type(args[0]) is Stale and args[0].__dict__[_STATE][1] is args[1]:
            old = args[0]
            revive(old)
            try:
                return func(*args, **kwargs)
            finally:
                retire(old, _NOBODY)
        raise SplitError(
            f"{name_of(func)} uses a tensor that `x += y` (or `-=`, `*=`, ...) has changed under another name, with "
            "values that differ between tasks: here that name alone has the new value. Write `x = x + y` if the old "
            "value is meant; else use the name in the statement. Name the module in `split(..., atomic=[...])`, so "
            "that it runs once per branch on plain tensors, or use mode='loop'."
        )


def retire(tensor: Tensor, other: Value) -> None:
    """Let nothing more be computed with a tensor, except `tensor + other`, once."""
    kind = type(tensor)
    if kind is not Stale:
        tensor.__dict__[_STATE] = (kind, other)
        tensor.__class__ = Stale


def revive(tensor: Tensor) -> None:
    """Undo `retire`."""
    if type(tensor) is Stale:
        tensor.__class__ = tensor.__dict__.pop(_STATE)[0]


def shares_memory(tensor: Tensor) -> bool:
    """Whether another tensor that somebody may use holds the same memory; a base that nobody holds does not count."""
    if _count_users is None:
        return False
    try:
        users = _count_users(tensor.untyped_storage()._cdata) - 1  # without the storage object made for asking
    except (RuntimeError, NotImplementedError):  # functorch's and sparse tensors have no storage
        return False
    if users > 1 and tensor._is_view() and sys.getrefcount(tensor._base) <= 2:
        users -= 1
    return bool(users > 1)
