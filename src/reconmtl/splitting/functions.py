"""What is known about PyTorch's functions by name: which write in place, which ask for metadata only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from reconmtl.splitting.structure import Value


def name_of(func: Callable[..., Value]) -> str:
    """How a function is called in messages."""
    name = getattr(func, "__name__", "") or str(func)
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return str(name)


_KIND: dict[Callable[..., Value], bool] = {}
_DUNDER = frozenset(
    f"__i{op}__"
    for op in ["add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
)


def writes(func: Callable[..., Value]) -> bool:
    """Whether a function changes an argument: operators by their schema, others by PyTorch's naming rule."""
    known = _KIND.get(func)
    if known is None:
        if isinstance(func, (OpOverload, OpOverloadPacket)):
            known = _KIND[func] = bool(written(func))
            return known
        name = str(getattr(func, "__name__", ""))
        known = name in _DUNDER or name in ("__setitem__", "__set__", "set_data")
        known = known or (
            name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad")
        )
        _KIND[func] = known
    return known


def written(func: OpOverload | OpOverloadPacket) -> set[tuple[int, str]]:
    """Which arguments an operator changes, by position (-1 for keywords only) and name."""
    overloads = [func] if isinstance(func, OpOverload) else [getattr(func, name) for name in func.overloads()]
    return {
        (-1 if argument.kwarg_only else i, argument.name)
        for overload in overloads
        for i, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def targets(func: Callable[..., Value], args: Sequence[Value], kwargs: dict[str, Value]) -> list[Value]:
    """The arguments that a call of a function that `writes` changes."""
    out = kwargs.get("out")
    if out is not None:
        return list(out) if isinstance(out, (list, tuple)) else [out]
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        found = [args[i] if 0 <= i < len(args) else kwargs.get(name) for i, name in sorted(written(func))]
        return [value for value in found if value is not None]
    return [args[0] if args else next(iter(kwargs.values()))]


def getters(*names: str) -> list[Callable[..., Value]]:
    """The functions that reading an attribute of a tensor calls."""
    return [getattr(Tensor, n).__get__ for n in names if hasattr(Tensor, n)]  # PyTorch versions differ


METADATA: list[Callable[..., Any]] = [
    *getters("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "is_nested", "is_mps"),
    *getters("is_quantized", "is_xla", "is_mkldnn", "is_cpu", "is_sparse_csr", "itemsize", "nbytes"),
    *(
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.nelement,
        Tensor.ndimension,
        Tensor.element_size,
        Tensor.get_device,
    ),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset),
    *(Tensor.__len__, Tensor.is_signed, Tensor.is_inference, torch.is_floating_point, torch.is_complex),
    *(torch.numel, torch.is_inference),
]
