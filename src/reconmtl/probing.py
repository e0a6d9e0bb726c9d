"""Watch training in the user's own loop: `probe.backward(losses)` instead of `sum(losses.values()).backward()`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from reconmtl.accumulation import Accumulation, accumulation_of
from reconmtl.balance import Balancer, Source
from reconmtl.buffers import undisturbed
from reconmtl.conflicts import ConflictLog, cosines_from_grams
from reconmtl.errors import ProbeError, RunError, UnknownNameError, nearest
from reconmtl.gram import Measured, check_losses
from reconmtl.jacobians import jac_grams
from reconmtl.parallel import ParallelGradients, gradients_of
from reconmtl.recording import Recorder
from reconmtl.schedule import Schedule

Engine = Literal["auto", "flat", "delta"]


class Scaler(Protocol):
    """What `torch.amp.GradScaler` offers, and whatever else scales losses."""

    def scale(self, outputs: Any, /) -> Any:  # noqa: ANN401 the scaler's own signature
        """Multiply by the scale."""

    def is_enabled(self) -> bool:
        """Whether it scales at all."""


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
            left out is found from the times of the first eight and shown by `every`.
        exact: Add one ordinary backward pass per measured step, so that `.grad` is bit-equal to plain training's.
        shared: Names or globs of shared layers, only needed where compiled regions hide the graph.
        group: Under data parallel training, who averages gradients. None: the DistributedDataParallel (or Fabric's)
            given as `model`. A `torch.distributed` process group: the probe itself, for a bare model in every process.
            A DistributedDataParallel that contains `model`. False: nobody, each process trains a model of its own.
            All processes call `backward` equally often, and hold the same log.
        balancer: How the tasks' gradients become one update: a name such as "cagrad:c=0.4", a `Balancer`, one of
            TorchJD's objects, or a function from the Gram matrix to weights. None sums them. What a balancer needs is
            measured in every step, and recorded in those that `every`, `start` and `stop` choose.

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
        group: Any = None,  # noqa: ANN401 checked by find_replicas
        balancer: object = None,
    ) -> None:
        if engine not in get_args(Engine):
            raise UnknownNameError(f"Unknown engine {engine!r}. {nearest(str(engine), get_args(Engine))}")
        self.exact = exact
        self.balancer: Balancer | None = None
        if balancer is not None and balancer != "joint":
            self.balancer = balancer if isinstance(balancer, Balancer) else Balancer(balancer)
            if exact:
                raise ProbeError("exact=True makes the update of joint training: it does not go with a balancer.")
        self._gradients = gradients_of(model, group=group, shared=shared, engine=engine)
        self._parallel = self._gradients if isinstance(self._gradients, ParallelGradients) else None
        agree = None if self._parallel is None else self._parallel.replicas.largest
        self._schedule = Schedule(every=every, start=start, stop=stop, overhead=overhead, agree=agree)
        self._recorder = Recorder(self._gradients.layers)
        self._null: Recorder | None = None
        self._open: bool | None = None  # whether the step whose micro-batches come in is measured; None between steps
        self._sums: Accumulation | None = None

    def backward(
        self,
        losses: Mapping[str, Tensor],
        *,
        scaler: Scaler | None = None,
        last: bool = True,
        null: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the gradient of the summed losses to `.grad`, and record how the tasks' gradients relate.

        Args:
            losses: Scalar loss per task, from one forward pass; a task absent from this step is left out.
            scaler: A `torch.amp.GradScaler`: the losses are scaled before, what is recorded is unscaled, and steps
                whose gradients are not finite are left out, as the scaler leaves them out (see `skipped`).
            last: False if more micro-batches of the same step follow. The step is then recorded once, with the Gram of
                the accumulated gradients; that takes tasks x (shared parameters) floats. A balancer acts on the
                accumulated gradients, and `.grad` gets them with the last micro-batch. Inside `no_sync()` of a
                DistributedDataParallel, micro-batches without last=False are ordinary backward passes, and the step's
                record is of the one outside.
            null: Per task, from the same forward pass, the loss on one half of the batch less that on the other. The
                Gram matrices of their gradients, which are nothing but the batch's noise, are recorded beside the
                others: from them `nulls.excess` samples how often unrelated gradients would conflict at each layer.
                Measuring a step then takes about twice as long; the update stays what it is.

        Raises:
            ProbeError: If a loss is no scalar, has no graph, or the graph cannot be told apart per task.
        """
        if null is not None:
            self._check_null(losses, null, scaler, last)
        if self._parallel is None:  # the other processes have to hear of it where they would wait
            check_losses(losses)
        elif not self._parallel.synchronises and last:
            if self.balancer is not None:
                raise ProbeError(
                    "A balancer needs the gradients of the whole step: inside `no_sync()` say that more micro-batches "
                    "follow, `probe.backward(losses, last=False)`."
                )
            if self._open is not None:
                raise ProbeError("The last micro-batch of a step is the one outside `no_sync()`: pass last=False here.")
            self._gradients.backward(losses)  # no step: it ends with the backward pass outside
            return
        if scaler is not None and scaler.is_enabled() and isinstance(losses, Mapping):
            losses = {task: scaler.scale(v) if isinstance(v, Tensor) else v for task, v in losses.items()}
        else:
            scaler = None
        if self.balancer is not None and self.balancer.needs_graph and not last:
            raise ProbeError(
                f"{self.balancer.label} works on gradients where the shared part of one forward pass ends: it does not "
                "go with micro-batches (last=False). Take smaller batches, or a method that balances at the weights."
            )
        with self._micro_batch(last) as (measure, whole):
            if null and measure:
                self._record_null(losses, null)
            if self.balancer is not None:
                self._balance(self.balancer, losses, scaler, measure, whole, last)
            elif not measure:
                self._gradients.backward(losses, last=last)
            elif whole:
                found = self._gradients.sweep(losses, retain_graph=self.exact)
                self._recorder.add(found.layout, _unscaled(found.gram, scaler), skip=scaler is not None)
                self._update(losses, found, last)
            else:
                assert self._sums is not None
                found = self._sums.take(losses, retain_graph=self.exact, last=last)
                whole_step = self._sums.gram() if last else None  # first, as other processes hear of a failure here
                self._update(losses, found, last)
                if whole_step is not None:
                    layout, gram = whole_step
                    self._recorder.add(layout, _unscaled(gram, scaler), skip=scaler is not None)
                    self._sums = None
                    if not self.exact:
                        self._gradients.average()

    def _check_null(
        self, losses: Mapping[str, Tensor], null: Mapping[str, Tensor], scaler: Scaler | None, last: bool
    ) -> None:
        """Raise a ProbeError that lists what does not go with a null."""
        faults = []
        if self._parallel is not None:
            faults.append("several processes train this model")
        if scaler is not None and scaler.is_enabled():
            faults.append("the losses are scaled")
        if not last or self._open is not None:
            faults.append("the step has several micro-batches")
        if isinstance(null, Mapping) and isinstance(losses, Mapping) and not set(null) <= set(losses):
            faults.append(f"it has tasks without a loss: {sorted(set(null) - set(losses))}")
        if faults:
            raise ProbeError(f"null= is recorded from the whole batch of a step in one process; {'; '.join(faults)}.")
        if null:
            check_losses(null)

    def _record_null(self, losses: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> None:
        """Record how the batch's noise relates the tasks, on the graph that the update is going to use."""
        if self._null is None:
            self._null = Recorder(self._gradients.layers)
        self._null.know(self._gradients.layout(losses))
        found = self._gradients.sweep(null, retain_graph=True)
        self._null.add(found.layout, found.gram, skip=True)  # half a batch may lack what a loss divides by

    def again(self, losses: Mapping[str, Tensor]) -> None:
        """Tell a balancer that wants to know it (`balancer.rule.looks_again`, as FAMO) what a step has changed.

        Args:
            losses: Of the same batch, after the optimizer's step; nothing is differentiated.
        """
        if self.balancer is not None:
            self.balancer.again(self._gradients.mean_losses(losses))

    def _balance(
        self,
        balancer: Balancer,
        losses: Mapping[str, Tensor],
        scaler: Scaler | None,
        measure: bool,
        whole: bool,
        last: bool,
    ) -> None:
        source: Source = self._gradients
        if not whole:
            assert self._sums is not None
            source = self._sums
            self._sums.take(losses, last=last)
        if not last:
            return  # `.grad` gets everything with the last micro-batch
        device = next(self._gradients.model.parameters()).device
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))
        found = balancer.backward(source, losses, scale=scale, measure=measure)
        self._sums = None
        if found is not None:
            self._recorder.add(found.layout, _unscaled(found.gram, scaler), skip=scaler is not None)

    @contextmanager
    def _micro_batch(self, last: bool) -> Iterator[tuple[bool, bool]]:
        """Enclose one backward pass; yields whether its step is measured, and whether it is the whole step."""
        measure, self._open = self._open, None  # a failed pass ends its step
        if measure is not None:
            yield measure, False
        else:
            self._sums = None
            if not last and self._schedule.overhead is not None:
                raise ProbeError(
                    "A budget of time (overhead) cannot be kept over micro-batches (last=False): pass `every` instead."
                )
            with self._schedule.step() as measure:
                if not last and (measure or self.balancer is not None):
                    self._sums = accumulation_of(self._gradients)
                yield measure, last
        self._open = None if last else measure

    def _update(self, losses: Mapping[str, Tensor], found: Measured, last: bool) -> None:
        if self.exact:
            self._gradients.backward(losses, last=last)
            found.settle()
        else:
            self._gradients.add(found)

    def record_jac(self, losses: Mapping[str, Tensor]) -> None:
        """Record from the `.jac` fields that `torchjd.autojac.backward` or `mtl_backward` has filled.

        Call it before `jac_to_grad`, which empties them. Nothing is differentiated and no `.grad` changes: the update
        is TorchJD's. `.jac` fields of several micro-batches are already summed when it is called once per step.

        Args:
            losses: Task -> the scalar that was differentiated, in the order in which TorchJD got them; only their
                graph is read, to see which task reaches what.

        Raises:
            ProbeError: If a shared parameter has no `.jac`, or not one row per loss; the parameters are named.
        """
        check_losses(losses)
        if self._parallel is not None:
            raise ProbeError(
                "The `.jac` fields are those of this process only. Average each over the processes (all_reduce) before "
                "`jac_to_grad`, and record them with a probe of the bare module, `Probe(model.module, group=False)`."
            )
        self._gradients.refuse_alone()
        with self._schedule.step() as measure:
            if measure:
                layout = self._gradients.layout(losses)
                self._recorder.add(layout, jac_grams(layout))

    @property
    def skipped(self) -> int:
        """Measured steps that were left out because a scaled gradient was not finite."""
        return self._recorder.skipped

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
        log = self._recorder.log(every=self.every)
        if self._null is not None and self._null.recorded:
            log = log.with_null(self._null.log(every=self.every))
        return log

    def state_dict(self) -> dict[str, Any]:
        """What was recorded and where the schedule stands: nested dicts and lists of tensors, numbers and strings.

        Raises:
            ProbeError: Between the micro-batches of a step.
        """
        if self._open is not None:
            raise ProbeError("This step is not finished: its last micro-batch has not come (last=True).")
        return {
            "recorder": self._recorder.state_dict(),
            "null": None if self._null is None else self._null.state_dict(),
            "schedule": self._schedule.state_dict(),
            "trusted": self._gradients.trusted(),
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401 from a file
        """Go on from what `state_dict` gave, with the same network.

        Raises:
            RunError: If it is damaged, or of another network.
        """
        device = next((p.device for p in self._gradients.model.parameters()), torch.device("cpu"))
        try:
            recorder, schedule, trusted = state["recorder"], state["schedule"], state["trusted"]
            balancer, null = state["balancer"], state.get("null")
        except (KeyError, TypeError, AttributeError):
            raise RunError("the state of a probe should hold recorder, schedule, trusted and balancer.") from None
        if (self.balancer is None) != (balancer is None):
            raise RunError("it was made with another balancer.")
        if self.balancer is not None:
            self.balancer.load_state_dict(balancer)
        self._schedule.load_state_dict(schedule)
        self._gradients.trust(trusted)
        self._recorder.load_state_dict(recorder, device)
        self._null = None if null is None else Recorder(self._gradients.layers)
        if self._null is not None:
            self._null.load_state_dict(null, device)

    def check(self, losses: Mapping[str, Tensor]) -> float:
        """Compare the engine with a slow oracle on the same graph: cosines, and the update with that of summed losses.

        Records nothing; `.grad`, buffers, modes and random states are afterwards what they were.

        Args:
            losses: Scalar loss per task; the graph is kept.

        Returns:
            The largest difference of a cosine, over layers that carry more than rounding noise.

        Raises:
            ProbeError: If a cosine differs by more than 1e-4 (1e-8 for a float64 model); or if the tasks' gradients do
                not add up to that of the summed losses, as with a hook that clips what flows back. The layer is named.
        """
        with undisturbed(self._gradients.model):
            found = self._gradients.sweep(losses, retain_graph=True)
            layout = found.layout
            if not layout.layers:
                raise ProbeError("No layer is reached by the losses of two tasks: there is nothing shared to measure.")
            expected = self._gradients.reference(losses, layout)
            joint = self._gradients.reference_update(losses, layout)
        n = len(layout.tasks)
        upper = torch.triu_indices(n, n)
        measured = found.gram.cpu().double()[:, upper[0], upper[1]]
        expected = expected[:, upper[0], upper[1]]
        ours, theirs = cosines_from_grams(measured, n), cosines_from_grams(expected, n)
        expected_norms = expected[:, upper[0] == upper[1]].sqrt()
        power = expected_norms.square().amax(1)
        loud = power > 1e-12 * power.max()
        heard = expected_norms.square() > 1e-12 * power.max()  # [layers, tasks]
        one, other = torch.triu_indices(n, n, 1)
        difference = torch.where(loud[:, None], (ours - theirs).abs(), 0.0)
        missed = ours.isnan() & heard[:, one] & heard[:, other]  # a gradient that is not zero was taken for zero
        difference = difference.nan_to_num(0.0).masked_fill(missed, 2.0)
        worst = float(difference.max()) if difference.numel() else 0.0
        if worst > (1e-8 if layout.dtype == torch.float64 else 1e-4):
            layer = layout.layers[int(difference.amax(1).argmax())]
            raise ProbeError(f"The probe's cosine of layer {layer!r} differs from the oracle's by {worst:.2e}.")
        norms = expected_norms.sum(1)
        for k, (segment, vector) in enumerate(zip(layout.segments, joint, strict=True)):
            error = float((found.total[segment.start : segment.stop].double() - vector).norm())
            if error > 0.05 * float(norms[k] + 1e-4 * norms.max()):  # parts may run in bfloat16
                raise ProbeError(
                    f"The tasks' gradients of layer {segment.layer!r} do not add up to the gradient of the summed "
                    "losses: something behind it, a hook or a backward of its own, is not linear in the gradient (it "
                    "clips, say). `Probe(model, exact=True)` takes the update from one ordinary backward pass."
                )
        return worst


def _unscaled(gram: Tensor, scaler: Scaler | None) -> Tensor:
    """Gram matrices of the gradients before scaling; without asking the device for the scale."""
    if scaler is None:
        return gram
    scale: Tensor = scaler.scale(torch.ones((), dtype=gram.dtype, device=gram.device))
    unscaled: Tensor = gram / scale / scale  # the square may overflow
    return unscaled
