"""Judge a model on a whole data set, independent of the batch size; and the machine that it runs on."""

from __future__ import annotations

import atexit
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reconmtl.batches import Sets, check_outputs, select, sets_of
from reconmtl.compiled import BACKEND, compile_faults
from reconmtl.errors import ProblemError, nearest
from reconmtl.forward import Forward
from reconmtl.interruptions import leave_if_asked
from reconmtl.problem import Metric, Problem
from reconmtl.randomness import seeded
from reconmtl.ranks import Ranks, started
from reconmtl.runs import Values

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # the large `lightning` package carries the same Fabric under another name
    from lightning.fabric import Fabric  # type: ignore[assignment]  # the same class


@functools.cache  # it holds no state of a training, and announces the precision each time it is made
def _fabric(accelerator: str, precision: Any, processes: int) -> Fabric:  # noqa: ANN401 Fabric spells out every name
    if processes == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    fabric = Fabric(
        accelerator=accelerator, devices=here, num_nodes=processes // here, precision=precision, strategy="ddp"
    )
    fabric.launch()
    if dist.is_initialized():
        atexit.register(_part)
    return fabric


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


PRECISIONS = ("32-true", "32", "bf16-mixed")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a training runs.

    Args:
        accelerator: "auto", "cpu", "cuda" ...: as Lightning Fabric names them.
        precision: "32-true" (or "32") or "bf16-mixed", as Lightning Fabric names them.
        max_batches: Only so many batches per epoch and evaluation: a smoke test, not a result.
        compile: Train under torch.compile; a string names its backend, True is "inductor". Probes, balancers and
            recorded trainings look into the graph of operations and run as they are, and so do evaluations.
        devices: Processes of one device each; more than one are started by `torchrun --nproc-per-node=N`, and then
            this need not be given. The batch size is that of each of them.
        sync_batchnorm: Let the processes' BatchNorms share their batch statistics (not on CPUs). Otherwise each
            normalises its own share of the batch, and the first one's running statistics are kept.
        checkpoint_steps: Save the training's state every so many steps too, not only after every epoch.
        checkpoint_seconds: Save it when so many seconds have passed since.
    """

    accelerator: str = "auto"
    precision: str = "32-true"
    max_batches: int | None = None
    compile: bool | str = False
    devices: int | None = None
    sync_batchnorm: bool = False
    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 600.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            # The others convert the weights or scale the loss, which the probe does not follow yet.
            raise ProblemError(
                f"precision = {self.precision!r}: expected one of {list(PRECISIONS)}. "
                f"{nearest(str(self.precision), PRECISIONS)}"
            )

        if not isinstance(self.compile, (bool, str)) or self.compile == "":
            raise ProblemError(f"compile = {self.compile!r}: expected True, False, or a backend of torch.compile.")
        if self.devices not in (None, started()):
            raise ProblemError(
                f"devices = {self.devices!r}: this program runs in {started()} process(es). Start it with "
                f"`torchrun --nproc-per-node={self.devices} -m reconmtl ...` (or your script instead of -m reconmtl)."
            )
        for name in ("max_batches", "checkpoint_steps", "checkpoint_seconds"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0):
                raise ProblemError(f"{name} = {value!r}: expected a positive number, or None.")

    @property
    def backend(self) -> str | None:
        """Of torch.compile; None without it."""
        return (BACKEND if self.compile is True else self.compile) or None

    def identity(self) -> dict[str, object]:
        """What of it a result depends on."""
        found: dict[str, object] = {"precision": self.precision, "max_batches": self.max_batches}
        if self.backend is not None:
            found["compile"] = self.backend
        if started() > 1:
            found |= {"processes": started(), "sync_batchnorm": self.sync_batchnorm}
        return found

    def ranks(self) -> Ranks:
        """The processes that train together, started by `torchrun`; else this one alone."""
        if started() == 1:
            return Ranks()
        fabric = self.fabric()
        return Ranks(fabric.global_rank, fabric.world_size, fabric.device)

    def fabric(self) -> Fabric:
        """The Fabric of one device in each process.

        Raises:
            ProblemError: If there is no such accelerator or precision, or this machine does not have it.
        """
        try:
            return _fabric(self.accelerator, self.precision, started())
        except (ValueError, RuntimeError, TypeError) as error:
            raise ProblemError(
                f"accelerator = {self.accelerator!r}, precision = {self.precision!r} cannot be used: {error}"
            ) from error

    def faults(self, processes: int | None = None) -> list[str]:
        """What cannot be used here, as sentences.

        Args:
            processes: How many will train together; None: as many as have been started.
        """
        try:
            device = self.fabric().device
        except ProblemError as error:
            return [str(error)]
        found = [] if self.backend is None else compile_faults(self.backend, device)
        if self.sync_batchnorm and (processes or started()) > 1 and device.type == "cpu":
            found.append(
                "sync_batchnorm: PyTorch's SyncBatchNorm does not work on CPUs. Leave it out, and each process "
                "normalises its own share of the batch; or use GroupNorm, which does not depend on the batch."
            )
        return found


def evaluate(problem: Problem, model: nn.Module, data: Sets, *, machine: Machine | None = None) -> Values:
    """Judge a model on a whole data set.

    Args:
        problem: Whose metrics are computed.
        model: On the device where it is to run; its mode is restored afterwards.
        data: The samples; or {task: samples}.
        machine: Where the batches go and how many there are.

    Returns:
        Task -> metric -> value: per-sample values averaged over all samples that have the target, whatever the batch
        size; or what a stateful metric computes.

    Raises:
        ProblemError: If the model lacks an output, a metric does not return one value per sample (or a stateful one not
            one number), or no sample has a task's target.
    """
    machine = machine or Machine()
    fabric = machine.fabric()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    forward = Forward(problem, model)
    ranks = machine.ranks()
    ranks.share(model.buffers())
    batches = [
        (own, part, indices)
        for own, part in sets_of(data).items()
        for indices in torch.arange(len(part)).split(problem.recipe.batch_size)[: machine.max_batches]
    ]
    sums = {(t.name, m.name): 0.0 for t in problem.tasks for m in t.metrics if not m.is_factory}
    states = {(t.name, m.name): m.fn() for t in problem.tasks for m in t.metrics if m.is_factory}
    for state in states.values():
        if hasattr(state, "to"):
            state.to(device)
        if hasattr(state, "sync_on_compute"):
            state.sync_on_compute = False  # every process sees everything, see below
    if not states:  # what a stateful metric has seen cannot be added up in general
        batches = batches[ranks.rank :: ranks.size]
    counts = dict.fromkeys(problem.task_names, 0)
    # What is drawn while judging (by transforms, say) must not move the training that goes on afterwards.
    with evaluating(model), torch.no_grad(), seeded(0):
        for own, part, indices in batches:
            if ranks.size == 1:
                leave_if_asked()
            inputs, targets = problem.batch(part, indices, device, own=own)
            with fabric.autocast():
                outputs = forward(own, inputs)
            check_outputs(outputs, targets)
            for task in problem.tasks:
                if task.name not in targets:
                    continue
                target, at = targets[task.name]
                output = select(outputs[task.name], at)
                n = len(indices) if at is None else len(at)
                counts[task.name] += n
                for metric in task.metrics:
                    key = (task.name, metric.name)
                    if key in states:
                        states[key].update(output, target)
                    else:
                        sums[key] += _per_sample_sum(metric.fn(output, target), n, *key)
    if not states:
        together = ranks.sum([*counts.values(), *sums.values()])
        counts = dict(zip(counts, map(round, together), strict=False))
        sums = dict(zip(sums, together[len(counts) :], strict=True))
    empty = [t.name for t in problem.tasks if t.metrics and not counts[t.name]]
    if empty and machine.max_batches is None:  # a smoke test need not meet every task
        raise ProblemError(f"No sample of the evaluated data has a target for {empty}; there is nothing to judge.")
    values: Values = {name: {} for name in problem.task_names}
    for task in problem.tasks:
        for metric in task.metrics:
            key = (task.name, metric.name)
            if task.name in empty:
                values[task.name][metric.name] = math.nan
                continue
            values[task.name][metric.name] = (
                _number(states[key].compute(), *key) if key in states else sums[key] / counts[task.name]
            )
    return values


def judge(metric: Metric, task: str, output: Any, target: Any, n: int) -> float:  # noqa: ANN401 of the user
    """One metric of a task on one batch of n samples.

    Raises:
        ProblemError: If it does not return one value per sample, or a stateful one not one number.
    """
    if not metric.is_factory:
        return _per_sample_sum(metric.fn(output, target), n, task, metric.name) / n
    state = metric.fn()
    state.update(output, target)
    return _number(state.compute(), task, metric.name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _per_sample_sum(values: Any, n: int, task: str, metric: str) -> float:  # noqa: ANN401 of the user
    if not isinstance(values, Tensor) or tuple(values.shape) != (n,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ProblemError(
            f"Metric {metric!r} of task {task!r} should return one value per sample, shape [{n}], found {found}; "
            "a mean over a batch cannot be averaged right over a test set."
        )
    return float(values.cpu().double().sum())  # not every accelerator has float64


def _number(value: Any, task: str, metric: str) -> float:  # noqa: ANN401 of the user
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ProblemError(
            f"`compute()` of metric {metric!r} of task {task!r} should return one number, found {value!r:.80}."
        ) from None
