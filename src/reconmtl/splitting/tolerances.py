"""When two numbers count as the same: outputs, gradients and buffers of a split model and of ordinary networks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.splitting.branched import WAYS_OUT

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest difference that passes at once, relative to the largest value of the tensor (of the task, for gradients)."""

KERNELS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference that may pass where an ordinary network does not repeat its own numbers bit for bit."""

MARGIN = 10
"""How many times farther than an ordinary network moves, if rounded otherwise, counts as another value."""

OWN = " from that of a network of its own"
COMPARED = "If you know why, and that it is right, split(..., rehearse=False) leaves the comparison out."
HINTS = {
    "output": (
        "one reason may be a value that is changed in place under one name (`shared += branched`) and used under "
        f"another; another, what modules pass on outside of their calls. {WAYS_OUT} {COMPARED}"
    ),
    "gradient": f"see `mode='loop'` for a way that always works. {COMPARED}",
    "buffer": f"name its module in `atomic=[...]`. {COMPARED}",
}


@dataclass(frozen=True)
class Shown:
    """What one call of a network has shown.

    Attributes:
        outputs: The tensors that it returned, without graph.
        gradients: {parameter: gradient}; None if nothing has one, or they were not asked for.
        buffers: {buffer: what it holds after the call}.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None] | None
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Where two calls differ.

    Attributes:
        kind: "output", "gradient" or "buffer".
        at: Its name.
        size: Relative to the largest value (of the task, for gradients); for integers, the share that differs.
        dtype: Of the numbers.
        text: What a message says about it.
    """

    kind: str
    at: str
    size: float
    dtype: torch.dtype
    text: str

    @property
    def within_rounding(self) -> bool:
        """Whether it passes at once."""
        return self.size <= ROUNDING.get(self.dtype, 0.0)

    @property
    def within_kernels(self) -> bool:
        """Whether kernels that do not repeat their own numbers may be the reason."""
        return self.size <= KERNELS.get(self.dtype, 0.0)


def differences(mine: Shown, expected: Shown, where: str) -> list[Difference]:
    """Compare what a split model and a network of one task's own have shown.

    Args:
        mine: What the split model has shown.
        expected: What the network of its own has shown.
        where: How messages begin.

    Returns:
        Everything that is not equal bit for bit: outputs, then gradients, then buffers.

    Raises:
        SplitError: If they cannot be compared: other shapes, or no gradient where there is one.
    """
    _check_outputs(mine.outputs, expected.outputs, where)
    found = []
    names = ["output" if len(mine.outputs) == 1 else f"output {i}" for i in range(len(mine.outputs))]
    for name, x, y in zip(names, mine.outputs, expected.outputs, strict=True):
        found.append(_difference("output", name, x, y, where))
    found += _gradients(mine.gradients, expected.gradients, where)
    for name, y in expected.buffers.items():
        x = mine.buffers[name]
        if x.shape == y.shape:
            found.append(_difference("buffer", f"buffer {name} after the call", x, y, where))
    return [d for d in found if d.size > 0]


def unexplained(found: list[Difference], again: list[Difference], nudged: list[Difference]) -> list[Difference]:
    """The differences that rounding cannot explain.

    Args:
        found: Differences between the split model and an ordinary network.
        again: Between two runs of the ordinary network.
        nudged: Between the ordinary network and one with the smallest change of its parameters.
    """
    own = {d.at: d.size for d in nudged}
    return [d for d in found if d.size > MARGIN * own.get(d.at, 0.0) or (again and not d.within_kernels)]


def refusal(difference: Difference, again: list[Difference]) -> SplitError:
    """The error for a difference; `again` as for `unexplained`."""
    state = "It also differs from itself when called again: it keeps a state outside of the model, or is random. "
    return SplitError(f"{difference.text}; {state if again else ''}{HINTS[difference.kind]}")


def precision(model: nn.Module) -> float:
    """The coarsest rounding that a model's forward does: of its parameters, or of autocast around it."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for device in {p.device.type for p in model.parameters()} - {"meta"}:
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
    return max((torch.finfo(k).eps for k in kinds), default=0.0)


def _check_outputs(mine: list[Tensor], expected: list[Tensor], where: str) -> None:
    if len(mine) != len(expected):
        raise SplitError(
            f"{where}: the split model returned {len(mine)} tensors, a network of its own {len(expected)}."
        )
    for i, (x, y) in enumerate(zip(mine, expected, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise SplitError(
                f"{where}: output{f' {i}' if len(mine) > 1 else ''} is {tuple(x.shape)} {x.dtype}, a network of its "
                f"own gives {tuple(y.shape)} {y.dtype}."
            )


def _gradients(
    mine: dict[str, Tensor | None] | None, expected: dict[str, Tensor | None] | None, where: str
) -> Iterator[Difference]:
    if expected is None:
        return
    if mine is None:
        raise SplitError(f"{where}: the output has no gradient, that of a network of its own has one.")
    top = max((_largest(g) for g in expected.values() if g is not None), default=0.0)
    for name, y in expected.items():
        x = mine[name]
        at = f"gradient of {name}"
        if x is not None and y is not None:
            yield _difference("gradient", at, x, y, where, top)
        elif x is not None and bool(_dense(x).count_nonzero()):
            text = f"{where}: {at} is not zero, although the task's own network does not use it"
            yield Difference("gradient", at, float("inf"), x.dtype, text)
        elif y is not None:
            text = f"{where}: {at} is missing, although the task's own network uses it"
            yield Difference("gradient", at, float("inf"), y.dtype, text)


def _largest(t: Tensor) -> float:
    t = _dense(t).abs()
    t = t[t.isfinite()]
    return float(t.max()) if t.numel() else 0.0


def _dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.layout is not torch.strided else t


def _difference(kind: str, at: str, x: Tensor, y: Tensor, where: str, top: float | None = None) -> Difference:
    dtype = x.dtype.to_real() if x.is_complex() else x.dtype
    x, y = _dense(x), _dense(y)
    if not (x.is_floating_point() or x.is_complex()):
        share = float((x != y).double().mean()) if x.numel() else 0.0
        return Difference(kind, at, share, dtype, f"{where}: {at} differs{OWN}")
    if torch.equal(x, y):
        return Difference(kind, at, 0.0, dtype, "")
    top = max(_largest(y) if top is None else top, 1e-30)
    both = x.isfinite() & y.isfinite()
    wide = torch.promote_types(x.dtype, torch.float32)
    gap = (torch.where(both, x, 0).to(wide) - torch.where(both, y, 0)).abs()
    size = float(gap.max()) / top if bool((x.isfinite() == y.isfinite()).all()) else float("inf")
    return Difference(kind, at, size, dtype, f"{where}: {at} differs by {size:.2g} (relative){OWN}")
