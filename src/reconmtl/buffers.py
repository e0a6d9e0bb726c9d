"""What measuring must leave as it was: buffers, modes and random states, although a graph may run a forward again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
        (m, [(name, b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()])
        for m in model.modules()
        if m._buffers
    ]
    try:
        with untouched_randomness():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, kept in buffers:
            _put_back(module, kept)


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
    modules = [m for m in model.modules() if m._buffers]
    seen = [_look(m) for m in modules]
    kept: dict[int, list[tuple[str, Tensor | None, Tensor | None]]] = {}

    def settle() -> None:
        for k, module in enumerate(modules):
            now = _look(module)
            if len(now) == len(seen[k]) and all(a is b and v == w for (a, v), (b, w) in zip(now, seen[k], strict=True)):
                continue
            if k in kept:
                _put_back(module, kept[k])
            else:
                kept[k] = [(n, b, None if b is None else b.detach().clone()) for n, b in module._buffers.items()]
            seen[k] = _look(module)

    return settle


def _look(module: nn.Module) -> list[tuple[Tensor | None, int]]:
    """A module's buffers, which forwards may change or replace, each with its count of changes."""
    return [(b, 0 if b is None or b.is_inference() else b._version) for b in module._buffers.values()]


def _put_back(module: nn.Module, kept: list[tuple[str, Tensor | None, Tensor | None]]) -> None:
    for name, buffer, value in kept:
        module._buffers[name] = buffer
        if buffer is not None and value is not None:
            buffer.data.copy_(value)  # `.data`: a graph that has saved the buffer finds the value it has saved
