"""What measuring must leave as it was: buffers, modes and random states, although a graph may run a forward again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reconmtl.randomness import untouched_randomness


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers, training modes and all global random states back afterwards.

    Args:
        model: Whose buffers and modes are meant.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, b, None if b is None else b.detach().clone())
        for m in model.modules()
        for name, b in m._buffers.items()
    ]
    try:
        with untouched_randomness():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if buffer is not None and value is not None and not _equal(buffer, value):
                buffer.data.copy_(value)  # `.data`: a graph that has saved the buffer finds the value it has saved


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if not a.is_floating_point() else bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def buffers_once(model: nn.Module) -> Callable[[], None]:
    """Let only the first of several backward passes over a graph change the model's buffers.

    Activation checkpointing runs the forward again in every pass, and with it the update of running statistics; plain
    training has one such pass.

    Args:
        model: Its buffers as they are now.

    Returns:
        To be called after each backward pass.
    """
    # Per module, because `F.batch_norm` changes running statistics without telling autograd's version counter; the
    # module's counter of batches does tell.
    groups = [[b for b in m.buffers(recurse=False) if not b.is_inference()] for m in model.modules()]
    groups = [g for g in groups if g]
    versions = [[b._version for b in g] for g in groups]
    kept: dict[int, list[Tensor]] = {}

    def settle() -> None:
        for k, group in enumerate(groups):
            if [b._version for b in group] != versions[k]:
                with torch.no_grad():
                    if k in kept:
                        for buffer, value in zip(group, kept[k], strict=True):
                            buffer.copy_(value)
                    else:
                        kept[k] = [b.clone() for b in group]
                versions[k] = [b._version for b in group]

    return settle
