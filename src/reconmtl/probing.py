"""Watch training in the user's own loop: `probe.backward(losses)` instead of `sum(losses.values()).backward()`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from reconmtl.conflicts import ConflictLog, cosines_from_grams
from reconmtl.errors import ProbeError, UnknownNameError, nearest
from reconmtl.gram import Gradients, add_update, check_losses, reference_grams
from reconmtl.recording import Recorder
from reconmtl.schedule import Schedule

Engine = Literal["auto", "flat", "delta"]


class Probe:
    """Records the Gram matrices of task gradients while a model trains; the update stays that of the summed loss.

    Args:
        model: The network; shared layers are found from the graph. Split models too: per-task copies are not measured.
        engine: Where gradients are taken: "flat" at the weights, "delta" at the output of every layer that allows it
            (see `engines.py`), "auto" where that clearly pays. `engines` says which layer uses which.
        every: Measure one step of so many; the others are plain backward passes.
        start: First step that may be measured, counted from 0.
        stop: First step that is not measured any more; None never stops.
        overhead: Instead of `every`: the share of training time that measuring may add, e.g. 0.1. How many steps are
            left out is found from the times of the first six and shown by `every`.
        exact: Add one ordinary backward pass per measured step, so that `.grad` is bit-equal to plain training's.
        shared: Names or globs of shared layers, only needed where compiled regions hide the graph.

    Raises:
        ProbeError: If the model cannot be measured as it is; the message says why.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> probe = Probe(model)
        >>> out = model(torch.ones(4, 3))
        >>> probe.backward({"a": out[:, 0].mean(), "b": -out.mean()})
        >>> probe.log.scores(severity=0.0).tolist()
        [1]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: Engine = "auto",
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        overhead: float | None = None,
        exact: bool = False,
        shared: Iterable[str] | None = None,
    ) -> None:
        if engine not in get_args(Engine):
            raise UnknownNameError(f"Unknown engine {engine!r}. {nearest(str(engine), get_args(Engine))}")
        self._schedule = Schedule(every=every, start=start, stop=stop, overhead=overhead)
        self.exact = exact
        self._gradients = Gradients(model, shared=shared, engine=engine)
        self._recorder = Recorder(self._gradients.layers)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradient of the summed losses to `.grad`, and record how the tasks' gradients relate.

        Args:
            losses: Scalar loss per task, from one forward pass; a task absent from this step is left out.

        Raises:
            ProbeError: If a loss is no scalar, has no graph, or the graph cannot be told apart per task.
        """
        with self._schedule.step() as measure:
            if measure:
                self._measure(losses)
            else:
                check_losses(losses)
                _sum(losses).backward()

    def _measure(self, losses: Mapping[str, Tensor]) -> None:
        found = self._gradients.sweep(losses, retain_graph=self.exact)
        self._recorder.add(found.layout, found.gram)
        if self.exact:
            _sum(losses).backward()
            found.settle()
        else:
            add_update(found.layout, found.total, found.own, found.sparse)

    @property
    def every(self) -> int:
        """One of how many steps is measured."""
        return self._schedule.every

    @property
    def engines(self) -> dict[str, str]:
        """Which engine each measured layer uses and, if it is "flat", why; empty before the first measured step."""
        return dict(self._gradients.engines)

    @property
    def log(self) -> ConflictLog:
        """What has been recorded so far.

        Raises:
            ProbeError: If nothing was recorded, or no layer is shared by two tasks.
        """
        return self._recorder.log(every=self.every)

    def check(self, losses: Mapping[str, Tensor]) -> float:
        """Compare the engine with a slow oracle on the same graph; records nothing and leaves `.grad` alone.

        Args:
            losses: Scalar loss per task; the graph is kept.

        Returns:
            The largest difference of a cosine, over layers that carry more than rounding noise.

        Raises:
            ProbeError: If a cosine differs by more than 1e-4 (1e-8 for a float64 model); the layer is named.
        """
        found = self._gradients.sweep(losses, retain_graph=True)
        layout = found.layout
        if not layout.layers:
            raise ProbeError("No layer is reached by the losses of two tasks: there is nothing shared to measure.")
        parameters = dict(layout.shared)
        by_layer = {
            layer.name: [parameters[p] for p in layer.parameters if p in parameters]
            for layer in self._gradients.layers
            if layer.name in layout.layers
        }
        n = len(layout.tasks)
        upper = torch.triu_indices(n, n)
        measured = found.gram.cpu().double()[:, upper[0], upper[1]]
        expected = reference_grams(losses, by_layer)
        found.settle()
        expected = expected[:, upper[0], upper[1]]
        ours, theirs = cosines_from_grams(measured, n), cosines_from_grams(expected, n)
        power = expected[:, upper[0] == upper[1]].amax(1)
        loud = power > 1e-12 * power.max()
        difference = torch.where(loud[:, None], (ours - theirs).abs(), 0.0).nan_to_num(0.0)
        worst = float(difference.max()) if difference.numel() else 0.0
        if worst > (1e-8 if layout.dtype == torch.float64 else 1e-4):
            layer = layout.layers[int(difference.amax(1).argmax())]
            raise ProbeError(f"The probe's cosine of layer {layer!r} differs from the oracle's by {worst:.2e}.")
        return worst


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    total = sum(losses.values())
    assert isinstance(total, Tensor)  # check_losses has seen at least one tensor
    return total
