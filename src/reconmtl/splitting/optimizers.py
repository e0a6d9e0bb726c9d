"""Optimizers of split models: check that nothing is missing, carry a running one over."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reconmtl.errors import OptimizerError
from reconmtl.splitting.states import copies_of


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that an optimizer holds exactly the trainable parameters of a model.

    Args:
        model: Any module, split or not.
        optimizer: Any `torch.optim.Optimizer`.

    Raises:
        OptimizerError: If trainable parameters are missing (their names are listed), or it holds others (shapes).
    """
    mine = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in mine.items() if p.requires_grad and id(p) not in held]
    known = {id(p) for p in mine.values()}
    stale = [
        f"group {i}, number {j}, shape {tuple(p.shape)}"
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
        if id(p) not in known
    ]
    if missing or stale:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} trainable parameters of the model: {_some(missing)}")
        if stale:
            parts.append(f"holds {len(stale)} parameters that are not the model's: {_some(stale)}")
        raise OptimizerError(
            f"The {type(optimizer).__name__} {' and '.join(parts)}. Build it after the split, from the split model's "
            "parameters, or use `rm.split_optimizer(optimizer, model, split_model)`."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def split_optimizer(optimizer: Optimizer, model: nn.Module, split_model: nn.Module) -> Optimizer:
    """Carry a running optimizer over to a split model: same class, same options, every copy with the layer's state.

    Args:
        optimizer: Optimizer of the model's parameters; stays as it is.
        model: The model before the split.
        split_model: What `split(model, plan)` returned.

    Returns:
        A new optimizer for `split_model`.

    Raises:
        OptimizerError: If the optimizer is not the model's, or its state cannot be told apart by parameter (LBFGS).

    Example:
        >>> from reconmtl.plan import Plan
        >>> from reconmtl.splitting import split
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> new = split(net, Plan(tasks=["a", "b"], layers=["1"]))
        >>> len(split_optimizer(adam, net, new).param_groups[0]["params"])
        6
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError("LBFGS keeps one state for all parameters together; build a new one for the split model.")
    names = {id(p): n for n, p in model.named_parameters()}
    foreign = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise OptimizerError(
            f"The optimizer holds {foreign} parameters that are not those of the model before the split."
        )
    targets = copies_of(model, split_model)
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        options = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({"params": [t for p in group["params"] for t in targets[names[id(p)]].values()], **options})
    new = _same_class(optimizer, groups)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state:
                for target in targets[names[id(p)]].values():
                    new.state[target] = {k: _carried(v) for k, v in state.items()}
    return new


def _carried(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _same_class(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A new optimizer with the given groups; arguments that its class requires come from its defaults."""
    kind = type(optimizer)
    accepted = inspect.signature(kind).parameters
    needed = {
        n: optimizer.defaults[n]
        for n, p in accepted.items()
        if n in optimizer.defaults and p.kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    try:
        return kind(groups, **needed)
    except TypeError as error:
        raise OptimizerError(
            f"A new {kind.__name__} cannot be made from its defaults ({error}); build one for the split model."
        ) from error
