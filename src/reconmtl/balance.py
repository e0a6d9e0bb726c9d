"""A balancer at work: what happens to the gradients of shared parameters, where joint training adds them.

A balancer acts on exactly the parameters that two or more tasks reach, as one vector; a copy that a group of tasks
shares belongs to it, with zeros for the other tasks. Heads and per-task copies get their own task's gradient, unless
the method weighs whole losses. Everything is relative to the sum of the losses: a method that is published relative to
their mean is multiplied by the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reconmtl.balancers import label_of, make_rule
from reconmtl.errors import ProbeError, RunError
from reconmtl.gram import Gradients, Layout, Measured
from reconmtl.jacobian_descent import adopt
from reconmtl.rules import Rule


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
        self.at = "weights"
        if isinstance(spec, str):
            self.rule, self.at = make_rule(spec, len(self.tasks))
        else:
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
