"""Balancers by name: what happens to the gradients of shared parameters, where joint training adds them.

A balancer acts on exactly the parameters that two or more tasks reach, as one vector; a copy that a group of tasks
shares belongs to it, with zeros for the other tasks. Heads and per-task copies get their own task's gradient, unless
the method weighs whole losses. Everything is relative to the sum of the losses: a method that is published relative to
their mean is multiplied by the number of tasks.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reconmtl.errors import ProbeError, ProblemError, RunError, nearest
from reconmtl.gram import Gradients, Layout, Measured
from reconmtl.jacobian_descent import Aggregated, adopt, scalarizer, torchjd, weighting
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


def _count(name: str, tasks: int) -> dict[str, int]:
    return {"tasks": tasks} if "tasks" in inspect.signature(BALANCERS[name].make).parameters else {}


def label_of(spec: object) -> str:
    """How tables call a balancer: its name as in the paper, with the parameters that were given."""
    if not isinstance(spec, str):
        return type(spec).__name__ if not hasattr(spec, "__name__") else str(spec.__name__)
    name, _, rest = spec.partition(":")
    label = BALANCERS[name].label if name in BALANCERS else name
    return f"{label} ({rest.replace(',', ', ')})" if rest else label


class Source(Protocol):
    """Where a step's gradients come from: one graph (`Gradients`), or the sum of several (`Accumulation`)."""

    def sweep(
        self,
        losses: Mapping[str, Tensor],
        *,
        retain_graph: bool = False,
        weigh: Callable[[Tensor, Layout], Tensor] | None = None,
    ) -> Measured:
        """See `Gradients.sweep`."""

    def explicit(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> tuple[Measured, Tensor]:
        """See `Gradients.explicit`."""

    def mean_losses(self, losses: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> dict[str, float]:
        """See `Gradients.mean_losses`."""

    def same_everywhere(self, vector: Tensor) -> Tensor:
        """See `Gradients.same_everywhere`."""

    def add(self, found: Measured) -> None:
        """See `Gradients.add`."""


class Balancer:
    """A balancer at work: forms the updates of one training, and holds the state of its method.

    Args:
        spec: A name with parameters, e.g. "cagrad:c=0.4"; or an object, see `adopt`. An object's result is taken as it
            is, without a factor.
        tasks: Names of the tasks; methods with a state take those of the first step if none are given.

    Attributes:
        at: "features" if weights come from the gradients where the shared part ends (written "mgda:at=features"): T
            times cheaper, and for MGDA an upper bound; "weights" otherwise.
        rule: Of the method.
        label: As tables call it.

    Raises:
        ProblemError: If the name or a parameter is unknown; every fault is listed.
        MissingExtraError: If it needs what is not installed.

    Example:
        >>> Balancer("cagrad:c=0.4", ("a", "b")).weights(torch.eye(2)).tolist()
        [1.3448275862068966, 1.3448275862068966]
    """

    def __init__(self, spec: object, tasks: Sequence[str] = ()) -> None:
        self.tasks, self.label = tuple(tasks), label_of(spec)
        if isinstance(spec, str):
            name, values, faults = _parse(spec)
            count = _count(name, len(self.tasks)) if not faults else {}
            if count and not tasks:
                faults.append(f"{name} learns a number per task: write Balancer({spec!r}, tasks=[...]).")
            if faults:
                raise ProblemError("\n".join(faults))
            self.at: str = values.pop("at", "weights")
            self.rule = BALANCERS[name].make(**values, **count)
        else:
            self.at = "weights"
            self.rule = adopt(spec)

    @property
    def needs_graph(self) -> bool:
        """Whether it needs the graph of one forward pass, so that a step cannot be made of micro-batches."""
        return self.at == "features"

    def weights(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of the tasks' gradients.

        Args:
            gram: Inner products of the gradients of everything shared, [T, T].
            losses: [T], for methods that see them.

        Returns:
            [T], float64. All 1 if the Gram matrix is not finite, so that the gradients stay not finite, too.
        """
        gram = gram.detach().to("cpu", torch.float64)
        if not bool(gram.isfinite().all()):
            return torch.ones(len(gram), dtype=torch.float64)
        values = torch.ones(len(gram), dtype=torch.float64) if losses is None else losses.detach().cpu().double()
        with self._explained(len(gram)):
            found = self.rule.weights((gram + gram.T) / 2, values)
        if not isinstance(found, Tensor) or found.shape != (len(gram),):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ProbeError(f"The balancer {self.label} should return {len(gram)} weights, it returned {got}.")
        if not bool(found.isfinite().all()):
            raise ProbeError(f"The balancer {self.label} returned weights that are not finite: {found.tolist()}.")
        return found.detach().double()

    def backward(
        self, gradients: Source, losses: Mapping[str, Tensor], *, scale: Tensor | float = 1.0, measure: bool = True
    ) -> Measured | None:
        """Add the update of one step to `.grad`, see `sweep`; returns the Gram matrices if they are wanted."""
        found = self.sweep(gradients, losses, scale=scale, measure=measure)
        if found is not None:
            gradients.add(found)
        return found if measure else None

    def _at_features(self, gradients: Source, losses: Mapping[str, Tensor], measure: bool) -> Measured:
        """Weights from the gradients at the features; the Gram matrices of the layers only if they are wanted."""
        if type(gradients) is not Gradients:
            raise ProbeError("at=features works in one process: balance at the weights.")
        layout = gradients.layout(losses)
        sharing = _sharing(layout)
        values = gradients.mean_losses(losses)

        def weigh(gram: Tensor) -> Tensor:
            out = torch.ones(len(gram), dtype=torch.float64)
            if sharing:
                self._check_tasks([layout.tasks[i] for i in sharing])
                out[sharing] = self.weights(gram[sharing][:, sharing], _losses_of(layout, sharing, values))
            return out

        measured = gradients.sweep(losses, retain_graph=True) if measure else None
        found = gradients.at_features(losses, weigh)
        return found if measured is None else replace(found, gram=measured.gram)

    def sweep(
        self, gradients: Source, losses: Mapping[str, Tensor], *, scale: Tensor | float = 1.0, measure: bool = True
    ) -> Measured | None:
        """Run the passes of one step.

        Args:
            gradients: Of the model: of one graph, or accumulated over several.
            losses: Scalar loss per task, scaled by `scale`.
            scale: What a gradient scaler has multiplied the losses by.
            measure: Whether the Gram matrices are wanted in any case.

        Returns:
            Grams and update, to be added by `gradients.add`; None if one ordinary backward pass has added it.
        """
        rule = self.rule
        if self.at == "features":
            if isinstance(scale, Tensor):
                raise ProbeError("at=features does not go with a gradient scaler: balance at the weights.")
            return self._at_features(gradients, losses, measure)
        values = gradients.mean_losses(losses, scale) if self._sees_losses else {}
        if rule.takes == "rows":
            return self._rows(gradients, losses, values, scale)
        if rule.takes == "losses":
            self._check_tasks(tuple(values))
            seen = torch.tensor(list(values.values()), dtype=torch.float64)
            with self._explained(len(seen)):
                weights = gradients.same_everywhere(rule.weights(torch.zeros(0, 0), seen).detach())
            of = dict(zip(values, weights.tolist(), strict=True))
            if not measure and isinstance(gradients, Gradients):
                gradients.backward({t: v * of[t] for t, v in losses.items()})
                return None
            found = gradients.sweep(
                losses, weigh=lambda _, layout: torch.tensor([of[t] for t in layout.tasks], dtype=torch.float64)
            )
            return _with_heads(found, [of[t] for t in found.layout.tasks])
        used: list[float] = []

        def weigh(gram: Tensor, layout: Layout) -> Tensor:
            weights = self._weigh((gram.detach().double() / scale / scale).cpu(), layout, values)
            used[:] = weights.tolist()
            return weights

        found = gradients.sweep(losses, weigh=weigh)
        return _with_heads(found, used) if rule.weighs_losses else found

    @contextmanager
    def _explained(self, count: int) -> Iterator[None]:
        """Turn what a rule says about its arguments into an error that says which balancer it was."""
        try:
            yield
        except ValueError as error:
            told = str(error).replace("Parameter `matrix`", "the Jacobian")
            raise ProbeError(f"The balancer {self.label} cannot balance {count} tasks: {told}") from error

    @property
    def _sees_losses(self) -> bool:
        return self.rule.takes == "losses" or self.rule.weighs_losses or type(self.rule).own is not Rule.own

    def _check_tasks(self, found: Sequence[str]) -> None:
        self.tasks = self.tasks or tuple(found)
        if self.rule.keeps_tasks and set(found) != set(self.tasks):
            raise ProbeError(
                f"{self.label} keeps a state per task, and this step has {list(found)} instead of "
                f"{list(self.tasks)}: draw batches in which every task has targets, or take a method without a state."
            )

    def _weigh(self, gram: Tensor, layout: Layout, values: Mapping[str, float]) -> Tensor:
        """Weights of all tasks of a step; those that share nothing have 1."""
        sharing = _sharing(layout)
        out = torch.ones(len(layout.tasks), dtype=torch.float64)
        if sharing:
            self._check_tasks([layout.tasks[i] for i in sharing])
            placed = [
                _placed(g, segment.tasks, len(layout.tasks)) for g, segment in zip(gram, layout.segments, strict=True)
            ]
            whole = torch.stack(placed).sum(0)[sharing][:, sharing]
            out[sharing] = self.weights(whole, _losses_of(layout, sharing, values))
        return out

    def _rows(
        self,
        gradients: Source,
        losses: Mapping[str, Tensor],
        values: Mapping[str, float],
        scale: Tensor | float,
    ) -> Measured:
        found, rows = gradients.explicit(losses)
        layout, total = found.layout, found.total
        sharing = _sharing(layout)
        seen = _losses_of(layout, sharing, values)
        if sharing:
            self._check_tasks([layout.tasks[i] for i in sharing])
            taken = rows if len(sharing) == len(rows) else rows[sharing]
            taken = taken / scale if isinstance(scale, Tensor) else taken
            if bool(taken.isfinite().all()):  # else the sum shows the scaler, or the user, that something overflowed
                with self._explained(len(taken)):
                    total = self.rule.update(taken, seen) * scale
        if total.shape != found.total.shape:
            raise ProbeError(
                f"The balancer {self.label} should return {len(found.total)} numbers, it returned {list(total.shape)}."
            )
        found = replace(found, total=gradients.same_everywhere(total.to(found.total)))
        own = self.rule.own(_losses_of(layout, range(len(layout.tasks)), values))
        return found if own is None else _with_heads(found, own.tolist())

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer should train beside the network."""
        return self.rule.parameters()

    def again(self, values: Mapping[str, float]) -> None:
        """Tell a method that wants to know (`rule.looks_again`) the losses of the same batch after the step."""
        if self.rule.looks_again:
            self.rule.again(torch.tensor([values[t] for t in self.tasks], dtype=torch.float64))

    def end_epoch(self) -> None:
        """To be called after every epoch."""
        self.rule.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on."""
        return {"label": self.label, "rule": self.rule.state_dict()}

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401 from a file
        """Go on from what `state_dict` gave.

        Raises:
            RunError: If it is damaged, or of another balancer.
        """
        if not isinstance(state, dict) or state.get("label") != self.label:
            raise RunError(f"it was made with another balancer than {self.label}.")
        self.rule.load_state_dict(state["rule"])


def _placed(gram: Tensor, tasks: Sequence[int], count: int) -> Tensor:
    """A layer's Gram matrix with zeros for the tasks that do not reach it."""
    if len(tasks) == count:
        return gram
    index = torch.tensor(tasks)
    out = torch.zeros_like(gram)
    out[index[:, None], index] = gram[index[:, None], index]
    return out


def _sharing(layout: Layout) -> list[int]:
    """Positions of the tasks that share anything."""
    return sorted({i for segment in layout.segments for i in segment.tasks})


def _losses_of(layout: Layout, positions: Sequence[int], values: Mapping[str, float]) -> Tensor:
    """The losses of some tasks, float64; 1 where nobody asks for them."""
    return torch.tensor([values.get(layout.tasks[i], 1.0) for i in positions], dtype=torch.float64)


def _with_heads(found: Measured, weights: Sequence[float]) -> Measured:
    """The same with the gradients of heads and per-task copies weighted, too."""
    own = [[None if g is None else g * w for g in grads] for grads, w in zip(found.own, weights, strict=True)]
    return replace(found, own=own)
