"""Balancers by name: how tables call them, their parameters, and the rules that they stand for."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reconmtl.errors import ProblemError, nearest
from reconmtl.jacobian_descent import Aggregated, scalarizer, torchjd, weighting
from reconmtl.rules import (
    DualBalancing,
    GradDrop,
    GradNorm,
    Rule,
    cagrad,
    fairgrad,
    joint,
    mgda,
    nash_mtl,
    pcgrad,
)


@dataclass(frozen=True)
class Method:
    """A balancer that has a name: how tables call it, and what makes it from its parameters."""

    label: str
    make: Callable[..., Rule]


def _upgrad() -> Rule:
    return weighting("UPGradWeighting", times_tasks=True)


def _dualproj() -> Rule:
    return weighting("DualProjWeighting", times_tasks=True)


def _aligned(*, scale_mode: str = "min") -> Rule:
    if scale_mode not in ("min", "median", "rmse"):
        raise ValueError(f"scale_mode = {scale_mode!r}: expected min, median or rmse")
    return weighting("AlignedMTLWeighting", times_tasks=True, scale_mode=scale_mode)


def _gradvac(*, beta: float = 0.5) -> Rule:
    return weighting("GradVacWeighting", beta=beta)


def _krum(*, n_byzantine: int = 0, n_selected: int = 1) -> Rule:
    return weighting("KrumWeighting", times_tasks=True, n_byzantine=n_byzantine, n_selected=n_selected)


def _pcd(*, tau: float = 0.02, beta: float = 0.999) -> Rule:
    return weighting("PCDWeighting", invariant=False, tau=tau, beta=beta)


def _trimmed_mean(*, trim_number: int = 1) -> Rule:
    return Aggregated(torchjd("aggregation", "TrimmedMean", trim_number=trim_number), times_tasks=True)


def _excess(*, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> Rule:
    made = torchjd("aggregation", "ExcessMTL", robust_step_size=robust_step_size, n_warmup_steps=n_warmup_steps)
    return Aggregated(made, times_tasks=True)


def _uw(*, tasks: int) -> Rule:
    return scalarizer("UW", shape=tasks)


def _imtl_l(*, tasks: int) -> Rule:
    return scalarizer("IMTLL", shape=tasks)


def _famo(*, tasks: int, lr: float = 0.025, weight_decay: float = 1e-3) -> Rule:
    return scalarizer("FAMO", times_tasks=True, shape=tasks, lr=lr, weight_decay=weight_decay)


def _dwa(*, temperature: float = 2.0) -> Rule:
    return scalarizer("DWA", temperature=temperature)


def _stch(*, mu: float = 1.0) -> Rule:
    return scalarizer("STCH", times_tasks=True, mu=mu)


BALANCERS: Mapping[str, Method] = {
    "joint": Method("joint", joint),
    "mgda": Method("MGDA", mgda),
    "pcgrad": Method("PCGrad", pcgrad),
    "graddrop": Method("GradDrop", GradDrop),
    "cagrad": Method("CAGrad", cagrad),
    "nash-mtl": Method("Nash-MTL", nash_mtl),
    "fairgrad": Method("FairGrad", fairgrad),
    "imtl-g": Method("IMTL-G", lambda: weighting("IMTLGWeighting", times_tasks=True)),
    "aligned-mtl": Method("Aligned-MTL", _aligned),
    "upgrad": Method("UPGrad", _upgrad),
    "dualproj": Method("DualProj", _dualproj),
    "config": Method("ConFIG", lambda: Aggregated(torchjd("aggregation", "ConFIG"))),
    "gradvac": Method("GradVac", _gradvac),
    "krum": Method("Krum", _krum),
    "trimmed-mean": Method("Trimmed mean", _trimmed_mean),
    "pcd": Method("PCD", _pcd),
    "excess-mtl": Method("ExcessMTL", _excess),
    "rgw": Method("RGW", lambda: weighting("RandomWeighting", times_tasks=True)),
    "gradnorm": Method("GradNorm", GradNorm),
    "db-mtl": Method("DB-MTL", DualBalancing),
    "uw": Method("UW", _uw),
    "dwa": Method("DWA", _dwa),
    "imtl-l": Method("IMTL-L", _imtl_l),
    "famo": Method("FAMO", _famo),
    "stch": Method("STCH", _stch),
    "geometric-mean": Method("Geometric mean", lambda: scalarizer("GeometricMean", times_tasks=True)),
    "rlw": Method("RLW", lambda: scalarizer("Random", times_tasks=True)),
}
"""Every balancer that has a name. Your own needs none: pass the object."""


def check_balancer(spec: object) -> list[str]:
    """What is wrong with a balancer's name and parameters, as sentences; empty if nothing is."""
    if not isinstance(spec, str):
        return []
    return _parse(spec)[2]


def _parse(spec: str) -> tuple[str, dict[str, Any], list[str]]:
    """Name, parameters and faults of e.g. "cagrad:c=0.4,rescale=false"."""
    name, _, rest = spec.partition(":")
    if name not in BALANCERS:
        return name, {}, [f"Unknown balancer {name!r}. {nearest(name, BALANCERS)}"]
    parts = [part.strip() for part in rest.split(",")]
    places = [p.partition("=")[2] for p in parts if p.startswith("at=")]
    rest = ",".join(p for p in parts if not p.startswith("at="))
    values, faults = read_parameters(name, rest, BALANCERS[name].make)
    if not faults:
        try:
            rule = BALANCERS[name].make(**values, **_count(name, 2))
        except ValueError as error:
            return name, values, [f"{name}: {error}."]
        if places and (rule.takes != "gram" or rule.weighs_losses):
            faults.append(f"{name} does not work on a Gram matrix alone: at={places[-1]} does not apply to it.")
        elif places and places[-1] not in ("features", "weights"):
            faults.append(f"{name}: at = {places[-1]!r}: expected weights or features.")
    return name, {**values, **({"at": places[-1]} if places else {})}, faults


def read_parameters(name: str, text: str, make: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """Read "c=0.4,rescale=false" as the keyword arguments of a function, by the types of their defaults.

    Args:
        name: Of the method, for messages.
        text: What follows the colon.
        make: Whose keyword-only arguments are meant.

    Returns:
        Values, and what is wrong as sentences.
    """
    signature = inspect.signature(make).parameters.items()
    known = {n: p for n, p in signature if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    values: dict[str, Any] = {}
    faults = []
    for part in filter(None, text.split(",")):
        key, equals, written = (piece.strip() for piece in part.partition("="))
        if not equals or key not in known:
            faults.append(f"{name} has no parameter {key!r}. {nearest(key, known)} They are written 'cagrad:c=0.4'.")
            continue
        kind = type(known[key].default)
        try:
            values[key] = _value(written, kind)
        except (ValueError, SyntaxError):
            faults.append(f"{name}: {key} = {written!r}: expected {_KINDS[kind]}.")
    return values, faults


_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


def _value(text: str, kind: type) -> Any:  # noqa: ANN401 of the kind
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind is str:
        return text
    value = ast.literal_eval(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
        raise ValueError(text)
    return kind(value)


def make_rule(spec: str, tasks: int) -> tuple[Rule, str]:
    """The rule that a name and its parameters stand for, and where it balances: at the "weights" or "features".

    Args:
        spec: E.g. "cagrad:c=0.4,at=features".
        tasks: How many there are; 0 if that is not known.

    Raises:
        ProblemError: If the name or a parameter is unknown; every fault is listed.
        MissingExtraError: If it needs what is not installed.
    """
    name, values, faults = _parse(spec)
    count = _count(name, tasks) if not faults else {}
    if count and not tasks:
        faults.append(f"{name} learns a number per task: write Balancer({spec!r}, tasks=[...]).")
    if faults:
        raise ProblemError("\n".join(faults))
    at: str = values.pop("at", "weights")
    return BALANCERS[name].make(**values, **count), at


def _count(name: str, tasks: int) -> dict[str, int]:
    return {"tasks": tasks} if "tasks" in inspect.signature(BALANCERS[name].make).parameters else {}


def label_of(spec: object) -> str:
    """How tables call a balancer: its name as in the paper, with the parameters that were given."""
    if not isinstance(spec, str):
        return type(spec).__name__ if not hasattr(spec, "__name__") else str(spec.__name__)
    name, _, rest = spec.partition(":")
    label = BALANCERS[name].label if name in BALANCERS else name
    return f"{label} ({rest.replace(',', ', ')})" if rest else label
