"""Methods by name: which network a method trains, with which balancer, and what a search has to find before.

A method is "joint", "single", a balancer (the joint network with another update), or an architecture that is built from
the joint network. Parameters follow a colon: "cagrad:c=0.4", "mmoe:experts=3".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from reconmtl.balancers import BALANCERS, check_balancer, label_of, read_parameters
from reconmtl.errors import ProblemError, nearest
from reconmtl.evaluation import Machine
from reconmtl.networks.bmtas import search
from reconmtl.networks.cross_stitch import CrossStitch
from reconmtl.networks.mmoe import gates_slower, mmoe
from reconmtl.plan import Plan
from reconmtl.problem import Problem
from reconmtl.rotograd import RotoGrad, rotated, rotations_slower

BASES = ("single", "joint")


@dataclass(frozen=True)
class Architecture:
    """An architecture that has a name.

    Attributes:
        label: As tables call it.
        change: (problem, **parameters) -> the problem with its network.
        own_layers: Its layers have other names than the joint network's, so conflicts are searched on it.
        find: (problem, seed, machine, checkpoint, **parameters) -> a plan to be trained, None if nothing was found;
            `checkpoint` is a file for the state of the search, or None.
        balancer: (model, tasks, **parameters) -> what makes its updates; None if that is free.
    """

    label: str
    change: Callable[..., Problem]
    own_layers: bool = False
    find: Callable[..., Plan | None] | None = None
    balancer: Callable[..., object] | None = None


def _mmoe(problem: Problem, *, experts: int = 2, gates_lr: float = 0.0) -> Problem:
    """Experts with the recipe's learning rate, gates with a hundredth of it as in the paper, if none is given."""
    lr = gates_lr or problem.recipe.lr / 100

    def model() -> nn.Module:
        return mmoe(problem.model, problem.sample(), experts=experts)

    return _grouped(problem, "mmoe", model, partial(gates_slower, lr=lr))


def _cross_stitch(problem: Problem, *, kind: str = "shared") -> Problem:
    def model() -> nn.Module:
        make = problem.single if problem.single is not None else lambda _: problem.model()
        kinds: Any = kind  # CrossStitch refuses what it does not know
        return CrossStitch(make, problem.task_names, kind=kinds, sample=problem.sample())

    return problem.replace(model=model)


def _bmtas(problem: Problem, *, epochs: int = 0, resource_weight: float = 1.0) -> Problem:
    del epochs, resource_weight
    return problem


def _find_tree(
    problem: Problem,
    seed: int,
    machine: Machine,
    checkpoint: Path | None,
    *,
    epochs: int = 0,
    resource_weight: float = 1.0,
) -> Plan | None:
    """Search as long as the paper does, five sixths of the training, if no length is given."""
    length = epochs or max(1, round(problem.recipe.epochs * 5 / 6))
    tree = search(
        problem, epochs=length, resource_weight=resource_weight, seed=seed, machine=machine, checkpoint=checkpoint
    )
    return tree.plan if tree.plan.layers else None


def _rotograd(problem: Problem, *, m: int = 100, scale: bool = True, lr: float = 0.0) -> Problem:
    """Rotations with the recipe's learning rate, if none is given."""
    del scale

    def model() -> nn.Module:
        return rotated(problem.model(), m)

    return _grouped(problem, "rotograd", model, partial(rotations_slower, lr=lr or problem.recipe.lr))


def _rotations(
    model: nn.Module, tasks: tuple[str, ...], *, m: int = 100, scale: bool = True, lr: float = 0.0
) -> RotoGrad:
    del m, lr
    return RotoGrad(model, tasks, scale=scale)


def _grouped(
    problem: Problem, name: str, model: Callable[[], nn.Module], groups: Callable[[nn.Module], list[dict[str, Any]]]
) -> Problem:
    if problem.recipe.param_groups is not None:
        raise ProblemError(f"{name} has parameter groups of its own: it does not go with the recipe's param_groups.")
    return problem.replace(model=model, recipe=problem.recipe.override(param_groups=_Named(name, groups)))


class _Named:
    """Parameter groups of an architecture; its name and parameters stand in a run's config."""

    def __init__(self, name: str, groups: Callable[[nn.Module], list[dict[str, Any]]]) -> None:
        options = getattr(groups, "keywords", {})
        self.groups, self.__qualname__ = groups, f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})"

    def __call__(self, model: nn.Module) -> list[dict[str, Any]]:
        return self.groups(model)


ARCHITECTURES: Mapping[str, Architecture] = {
    "mmoe": Architecture("MMoE", _mmoe, own_layers=True),
    "cross-stitch": Architecture("Cross-Stitch", _cross_stitch, own_layers=True),
    "bmtas": Architecture("BMTAS", _bmtas, find=_find_tree),
    "rotograd": Architecture("RotoGrad", _rotograd, balancer=_rotations),
}
"""Every architecture that has a name. Your own needs none: it is a Problem with another `model`."""


@dataclass(frozen=True)
class Way:
    """What a method stands for.

    Attributes:
        base: "joint", "single", or an architecture's name.
        balancer: How the shared gradient is formed; None or "joint" is the sum.
        parameters: Of the architecture.
        label: As tables call it.
    """

    base: str
    balancer: object
    parameters: dict[str, Any]
    label: str

    @property
    def architecture(self) -> Architecture | None:
        """None for "joint" and "single"."""
        return ARCHITECTURES.get(self.base)

    def change(self, problem: Problem) -> Problem:
        """The problem with the method's network."""
        return problem if self.architecture is None else self.architecture.change(problem, **self.parameters)

    def find(
        self, problem: Problem, plan: Plan | None, seed: int, machine: Machine, checkpoint: Path | None = None
    ) -> Plan | None:
        """What a search adds to a plan: a tree, refined by the plan. A search that was stopped goes on."""
        if self.architecture is None or self.architecture.find is None:
            return plan
        tree: Plan | None = self.architecture.find(problem, seed, machine, checkpoint, **self.parameters)
        return tree or plan if tree is None or plan is None else tree.refine(plan)

    def at_work(self, model: nn.Module, tasks: tuple[str, ...]) -> object:
        """What makes the updates of a training of this network."""
        if self.architecture is not None and self.architecture.balancer is not None:
            return self.architecture.balancer(model, tasks, **self.parameters)
        return self.balancer


def check_method(method: object, balancer: object = None) -> list[str]:
    """What is wrong with a method and a balancer, as sentences; empty if nothing is."""
    if not isinstance(method, str):
        return [f"method = {method!r}: expected a name such as 'joint' or 'cagrad:c=0.4'."]
    name, _, rest = method.partition(":")
    faults = check_balancer(balancer) if balancer is not None else []
    if name in ("joint", "single") and rest:
        faults.append(f"{name} has no parameters, given {rest!r}.")
    elif name in ARCHITECTURES:
        faults += read_parameters(name, rest, ARCHITECTURES[name].change)[1]
    elif name in BALANCERS:
        faults += check_balancer(method)
        if balancer is not None and name != "joint":
            faults.append(f"method = {method!r} and balancer = {label_of(balancer)!r} both form the update: pass one.")
    elif name not in BASES:
        known = [*BASES, *(n for n in BALANCERS if n not in BASES), *ARCHITECTURES]
        faults.append(f"Unknown method {name!r}. {nearest(name, known)}")
    if balancer is not None and name == "single":
        faults.append("Single-task training has no gradients to balance: `balancer` does not apply to it.")
    if balancer not in (None, "joint") and name == "rotograd":
        faults.append("RotoGrad forms the update itself: `balancer` does not apply to it.")
    return faults


def way(method: str, balancer: object = None) -> Way:
    """What a method stands for.

    Args:
        method: A name, with parameters after a colon.
        balancer: How the shared gradient is formed, where the method leaves that open.

    Raises:
        ProblemError: If either is unknown or they contradict each other; every fault is listed.
    """
    faults = check_method(method, balancer)
    if faults:
        raise ProblemError("\n".join(faults))
    name, _, rest = method.partition(":")
    balancer = None if balancer == "joint" else balancer
    if name in ARCHITECTURES:
        parameters = read_parameters(name, rest, ARCHITECTURES[name].change)[0]
        label = ARCHITECTURES[name].label + (f" ({rest.replace(',', ', ')})" if rest else "")
        return Way(name, balancer, parameters, label if balancer is None else f"{label} + {label_of(balancer)}")
    if name in BASES:
        usual = {"single": "single-task"}.get(name, name)
        return Way(name, balancer, {}, usual if balancer is None else label_of(balancer))
    return Way("joint", method, {}, label_of(method))
