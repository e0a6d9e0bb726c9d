"""TorchJD's aggregators, weightings and scalarizers as rules; also a user's own, whatever their class.

TorchJD aggregates a Jacobian. Where an aggregator only needs the Jacobian's Gramian, its weighting gets the Gram matrix
that the probe has anyway, and no Jacobian is formed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reconmtl.errors import ProblemError, RunError, missing_extra
from reconmtl.rules import FromGram, Rule


def torchjd(kind: str, name: str, **options: Any) -> Any:  # noqa: ANN401 one of TorchJD's objects
    """Make one of TorchJD's objects.

    Args:
        kind: "aggregation" or "scalarization".
        name: Its class.
        **options: Of its construction.

    Raises:
        MissingExtraError: If TorchJD, or what it needs for this one, is not installed.
    """
    if importlib.util.find_spec("torchjd") is None:
        raise missing_extra(f"TorchJD's {name}", "torchjd")
    module = importlib.import_module(f"torchjd.{kind}")
    try:
        return getattr(module, name)(**options)
    except ImportError as error:
        raise missing_extra(f"TorchJD's {name} ({error})", "torchjd") from None


def weighting(name: str, *, times_tasks: bool = False, invariant: bool = True, **options: Any) -> Rule:  # noqa: ANN401
    """The rule of one of TorchJD's weightings of Gramians.

    Args:
        name: Its class.
        times_tasks: Its weights are relative to the mean of the losses.
        invariant: Its weights do not depend on the size of all gradients together, so that they may be brought to one
            size, as some of its bounds are absolute.
        **options: Of its construction.
    """
    return Weighted(torchjd("aggregation", name, **options), times_tasks=times_tasks, invariant=invariant)


def scalarizer(name: str, *, times_tasks: bool = False, **options: Any) -> Rule:  # noqa: ANN401
    """The rule of one of TorchJD's scalarizers; it is made with the number of tasks where it needs that."""
    return Scalarized(torchjd("scalarization", name, **options), times_tasks=times_tasks)


class Kept(Rule):
    """A rule whose state is what TorchJD's object holds in buffers, parameters and plain attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.keeps_tasks = hasattr(module, "reset")  # type: ignore[misc]  # of each object, not of the class

    def parameters(self) -> list[nn.Parameter]:
        """See `Rule`."""
        return [] if hasattr(self.module, "update") else list(self.module.parameters())  # FAMO trains its own

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {f"{name}.{key}": _packed(value) for name, key, value in _attributes(self.module)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rule`."""
        modules = dict(self.module.named_modules())
        for entry, value in state.items():
            name, _, key = entry.rpartition(".")
            if name not in modules:
                raise RunError(f"{type(self.module).__name__} has no part {name!r}: it was made by another version.")
            _put(modules[name], key, value)


def _suited(values: Tensor, module: nn.Module) -> Tensor:
    """The values in the type of the tensors that a module was made with, if any; it may not mix types."""
    own = [t.dtype for _, _, t in _attributes(module) if isinstance(t, Tensor) and t.is_floating_point()]
    return values.to(own[0]) if own else values


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Part, attribute and value of all that may be a state."""
    for name, part in module.named_modules():
        values = {**part._parameters, **part._buffers, **vars(part)}
        for key, value in values.items():
            if key in nn.Module().__dict__ or callable(value):
                continue
            if _plain(value) or isinstance(value, (np.ndarray, torch.optim.Optimizer)):
                yield name, key, value


def _plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype, torch.device))


def _packed(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, torch.optim.Optimizer):
        return {"optimizer": value.state_dict()}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return type(value)(_packed(v) for v in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def _unpacked(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "array":
            return content.numpy()
        return getattr(torch, content) if kind == "dtype" else torch.device(content)
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(v) for v in value)
    return value


def _put(part: nn.Module, key: str, value: Any) -> None:  # noqa: ANN401
    if isinstance(value, dict) and "optimizer" in value:
        own = part._w if getattr(part, key) is None else None  # FAMO's logits; it makes its Adam in the first step
        if own is not None:
            setattr(part, key, torch.optim.Adam([own], lr=part.lr, weight_decay=part.weight_decay))  # type: ignore[arg-type]
        getattr(part, key).load_state_dict(value["optimizer"])
    elif key in part._parameters:
        with torch.no_grad():
            part._parameters[key].copy_(value)  # type: ignore[union-attr]  # the optimizer holds this very tensor
    elif key in part._buffers:
        part._buffers[key] = value
    elif not isinstance(getattr(type(part), key, None), property):
        setattr(part, key, _unpacked(value))


class Weighted(Kept):
    """A weighting of Gramians; see `weighting`."""

    def __init__(self, module: nn.Module, *, times_tasks: bool = False, invariant: bool = False) -> None:
        super().__init__(module)
        self.times_tasks, self.invariant = times_tasks, invariant

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        size = gram.diagonal().sum()
        given = gram / size if self.invariant and size > 0 else gram
        found: Tensor = self.module(_suited(given, self.module)).detach()
        return found * len(losses) if self.times_tasks else found


class Aggregated(Kept):
    """An aggregator of Jacobians; its result is the update."""

    takes = "rows"

    def __init__(self, module: nn.Module, *, times_tasks: bool = False) -> None:
        super().__init__(module)
        self.times_tasks = times_tasks

    def update(self, rows: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        found: Tensor = self.module(rows).detach()
        return found * len(losses) if self.times_tasks else found


class Scalarized(Kept):
    """A scalarizer of losses: weights are its derivatives, and its own parameters get their gradients."""

    takes = "losses"
    weighs_losses = True

    def __init__(self, module: nn.Module, *, times_tasks: bool = False) -> None:
        super().__init__(module)
        self.times_tasks = times_tasks
        self.looks_again = hasattr(module, "update")  # type: ignore[misc]

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        del gram
        own = self.parameters()
        with torch.enable_grad():
            values = _suited(losses.detach().clone(), self.module).requires_grad_()
            total = self.module(values)
            found, *grads = torch.autograd.grad(total, [values, *own], allow_unused=True)
        for parameter, grad in zip(own, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return found * len(losses) if self.times_tasks else found

    def again(self, losses: Tensor) -> None:
        """See `Rule`."""
        self.module.update(losses)  # type: ignore[operator]

    def end_epoch(self) -> None:
        """See `Rule`."""
        if hasattr(self.module, "step"):
            self.module.step()  # type: ignore[operator]


def adopt(given: object) -> Rule:
    """The rule of a user's object: one of TorchJD's or a subclass, a Rule, or a function from Gram matrix to weights.

    Args:
        given: An `Aggregator`, `Weighting` or `Scalarizer` of TorchJD; a `Rule`; or a function [T, T] -> [T].

    Raises:
        ProblemError: If it is none of these.
    """
    if isinstance(given, Rule):
        return given
    if isinstance(given, nn.Module) and importlib.util.find_spec("torchjd") is not None:
        from torchjd import aggregation, scalarization

        if isinstance(given, aggregation.GramianWeightedAggregator):
            return Weighted(given.gramian_weighting)
        if isinstance(given, aggregation.Aggregator):
            return Aggregated(given)
        if isinstance(given, scalarization.Scalarizer):
            return Scalarized(given)
        if isinstance(given, (aggregation.ExcessMTLWeighting, aggregation.MoDoWeighting, aggregation.SDMGradWeighting)):
            wanted = "the Jacobian itself" if isinstance(given, aggregation.ExcessMTLWeighting) else "several batches"
            raise ProblemError(
                f"{type(given).__name__} needs {wanted}, not the Gramian of one batch: pass an Aggregator that does "
                "without."
            )
        if isinstance(given, aggregation.Weighting):
            return Weighted(given)
    if isinstance(given, nn.Module):
        raise ProblemError(
            f"balancer: {type(given).__name__} is no Aggregator, Weighting or Scalarizer of TorchJD. A function "
            "from the Gram matrix [T, T] to weights [T], or a reconmtl.rules.Rule, will do as well."
        )
    if callable(given) and not isinstance(given, type):
        return FromGram(given)
    raise ProblemError(
        f"balancer: expected a name such as 'cagrad:c=0.4', an Aggregator, Weighting or Scalarizer of TorchJD, a Rule, "
        f"or a function from the Gram matrix [T, T] to weights [T]; got {given!r}."
    )
