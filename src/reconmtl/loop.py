"""The one training loop: a network under one seed, stopped and continued as if it had never been stopped."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reconmtl.architectures import Way
from reconmtl.balance import Balancer
from reconmtl.batches import move, sets_of
from reconmtl.buffers import undisturbed
from reconmtl.checkpoints import Checkpoint, read_checkpoint, restore_model, save_checkpoint
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import Interrupted, ProblemError, ReconError, RunError
from reconmtl.evaluation import Machine, evaluate
from reconmtl.files import append_json
from reconmtl.forward import Batches, Forward, draw
from reconmtl.interruptions import interruption, was_asked
from reconmtl.loggers import Loggers
from reconmtl.plan import Plan
from reconmtl.probing import Probe
from reconmtl.problem import Problem
from reconmtl.progress import bar
from reconmtl.randomness import random_states, reseed, seeded, set_random_states
from reconmtl.replicas import Replicas
from reconmtl.runs import Values, plain_values
from reconmtl.sampling import Indices, Sampler
from reconmtl.splitting import check_optimizer, split

NormStats = Literal["per-task", "shared"]
Init = Literal["copy", "fresh"]
NEVER = 2**62
"""A step that no training reaches."""
LOOK = 50
"""Steps after which the losses are looked at."""
EVALUATIONS = 10
"""Evaluations spread over a training, the last one after the last epoch."""


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Attributes:
        model: The network after the last epoch.
        log: What was recorded; None if nothing was.
        parameters: Trained ones; of a single-task network those that its loss reaches.
        metrics: Of the test set after the last epoch; empty where training stopped before.
        seconds: Wall time of the training, interruptions left out.
        written: Bytes of the metrics file.
    """

    model: nn.Module
    log: ConflictLog | None
    parameters: int
    metrics: Values
    seconds: float
    written: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training is to do.

    Attributes:
        problem: What is trained.
        plan: Layers to split beforehand.
        seed: Of initialisation and batches.
        record: Measure one of so many steps; 0 none.
        overhead: Instead: the share of training time that measuring may add.
        null: Record what the batch's noise alone does, too.
        machine: Where and how it runs.
        description: Shown beside the progress bar and in errors.
        stop: Train only so many epochs of the recipe's schedule; None trains all.
        norm_stats: What split networks do with running statistics.
        way: The method's balancer, and what it makes of the network.
        init: How the copies of split layers start, see `split`.
        metrics: File that gets a line per epoch.
        begin: Where this training's lines begin in that file, in bytes.
        checkpoint: File from which it goes on and to which it saves; None keeps nothing.
        loggers: Are told each line of the metrics file.
    """

    problem: Problem
    plan: Plan | None
    seed: int
    record: int
    overhead: float | None = None
    null: bool = False
    machine: Machine
    description: str
    stop: int | None = None
    norm_stats: NormStats = "per-task"
    way: Way | None = None
    init: Init = "copy"
    metrics: Path | None = None
    begin: int = 0
    checkpoint: Path | None = None
    loggers: Loggers = field(default_factory=lambda: Loggers(()))


def train(job: Job) -> Trained:
    """Train one network, from its checkpoint if there is one.

    Raises:
        ReconError: If the loss is not finite, or a checkpoint is damaged or of another training.
        Interrupted: If a signal asked for it; the state is saved where there is a file for it.
    """
    with seeded(job.seed):
        return _Training(job).run()


def network(job: Job, *, synchronised: torch.device | None = None) -> nn.Module:
    """The network that a job trains, before the first step; drawn from the global random state.

    Args:
        job: Whose problem and plan it is.
        synchronised: Make its BatchNorms share their batch statistics between processes, on this device. This comes
            before the split, so that the copies of a split layer are of the same kind.
    """
    model, sample = job.problem.model(), job.problem.sample() if job.plan is not None else None
    if synchronised is not None:
        # Already on the sample that the split looks at they talk to the others, which they do on accelerators only.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model).to(synchronised)
        sample = move(sample, synchronised)
    if job.plan is None:
        return model
    return split(model, job.plan, init=job.init, norm_stats=job.norm_stats, sample=sample)


class _Training:
    """The state of one training; `_state` and `_restore` hold all of it that cannot be built again from the task."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds = job, 0.0
        self.since = self.saved = time.perf_counter()
        problem, recipe, machine = job.problem, job.problem.recipe, job.machine
        self.fabric, self.ranks = machine.fabric(), machine.ranks()
        self.epochs = recipe.epochs if job.stop is None else job.stop
        self.sampler = Sampler(
            {own: len(data) for own, data in sets_of(problem.train).items()},
            batch_size=recipe.batch_size,
            drop_last=recipe.drop_last,
            seed=job.seed,
            most=machine.max_batches,
            rank=self.ranks.rank,
            world=self.ranks.size,
        )
        if not self.sampler.steps:
            raise ProblemError(
                f"The training set has {self.sampler.longest} samples, fewer than one batch of "
                f"{self.sampler.together}: lower batch_size or pass drop_last=False."
            )
        together = machine.sync_batchnorm and self.ranks.size > 1
        model = network(job, synchronised=self.fabric.device if together else None)
        self.model = self.fabric.to_device(model)
        torch.manual_seed(job.seed)  # drawing the weights of one network more or less must not move dropout
        if self.ranks.rank:
            reseed((job.seed + 7919 * self.ranks.rank) % 2**32)  # or all processes would drop the same units
        self.optimizer = recipe.make_optimizer(model)
        check_optimizer(model, self.optimizer)
        self.balancer = self._balancer(model)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, list(recipe.milestones), gamma=recipe.gamma
        )
        self.probe = None
        if job.record or self.balancer is not None:
            self.probe = Probe(
                model,
                every=job.record or 1,
                start=0 if job.record else NEVER,
                overhead=job.overhead,
                shared=problem.shared,
                group=dist.group.WORLD if self.ranks.size > 1 else False,
                balancer=self.balancer,
            )
        # What measures the tasks' gradients looks into the graph of operations, which compilation hides.
        self.forward = Forward(problem, self.model, machine.backend if self.probe is None else None)
        self.replicas = None
        if self.ranks.size > 1 and self.probe is None:
            assert dist.group.WORLD is not None  # Fabric has made it
            self.replicas = Replicas(dist.group.WORLD)
        self.epoch = 1
        self.stepped = False  # whether the steps of this epoch are done and its evaluation comes next
        self.total = torch.zeros((), device=self.fabric.device)
        self.recent: list[tuple[int, tuple[str, ...], Tensor]] = []  # steps, tasks and losses since they were looked at
        self.absent = dict.fromkeys(problem.task_names, 0)
        self.asked = self.due = False  # whether a signal, or the time, asks for a checkpoint after this step
        self.reached: set[str] = set()
        self.values: Values = {}
        self.end: int | None = None  # of a training that was finished before: bytes of the metrics file up to there

    def _balancer(self, model: nn.Module) -> Balancer | None:
        """What forms the updates; what it learns itself is trained by the same optimizer."""
        job = self.job
        given = None if job.way is None else job.way.at_work(model, job.problem.task_names)
        if given is None:
            return None
        balancer = given if isinstance(given, Balancer) else Balancer(given, job.problem.task_names)
        if learned := balancer.parameters():
            decay = {"weight_decay": 0.0} if "weight_decay" in self.optimizer.defaults else {}
            self.optimizer.add_param_group({"params": learned, **decay})
        return balancer

    # The loop. --------------------------------------------------------------------------------------------------------

    def run(self) -> Trained:
        job = self.job
        if job.checkpoint is not None and job.checkpoint.exists():
            self._restore(read_checkpoint(job.checkpoint), job.checkpoint)
        else:
            self._cut(job.begin)
            self._save()  # a state or a disk that cannot be written to shows before the work
        done = (self.epoch - 1) * self.sampler.steps + self.sampler.step
        total = self.epochs * self.sampler.steps
        with bar(total, job.description, done=done, hidden=self.ranks.rank > 0) as progress:
            while self.epoch <= self.epochs:
                self.model.train()
                if not self.stepped:
                    for indices in self.sampler.epoch():
                        self._step(indices)
                        progress.update()
                        self._save_if_due()
                    self.stepped = True
                self._look()
                mean = self.ranks.sum([float(self.total)])[0] / self.ranks.size / self.sampler.steps
                progress.set_postfix_str(f"epoch {self.epoch}/{self.epochs}, loss {mean:.3f}")
                try:
                    entry = self._evaluated(mean)
                    self._write(entry)
                    job.loggers.log(entry)
                except Interrupted as asked:
                    self._leave(asked)
                self.schedule.step()
                if self.balancer is not None:
                    self.balancer.end_epoch()
                self.epoch, self.stepped = self.epoch + 1, False
                self.total.zero_()
                self.absent = dict.fromkeys(self.absent, 0)
                self._save()
        # Single-task networks are often joint ones: what their only task never reaches has no gradient and does not
        # count.
        counted = [p.numel() for n, p in self.model.named_parameters() if len(self.absent) > 1 or n in self.reached]
        log = self.probe.log if self.probe is not None and job.record else None
        return Trained(
            self.model,
            log,
            sum(counted),
            self.values,
            self._elapsed(),
            self._written() if self.end is None else self.end,
        )

    def _step(self, indices: Indices) -> None:
        problem, fabric, model = self.job.problem, self.fabric, self.model
        batches = draw(problem, problem.train, indices, fabric.device)
        with fabric.autocast():
            if self.job.null:
                losses, null = self.forward.with_differences(batches)
            else:
                losses, null = self.forward.losses(batches), None
        if not self._share(losses, batches, indices):
            return
        self.optimizer.zero_grad()
        each = torch.stack([v.detach() for v in losses.values()]) if losses else self.total.new_zeros(1)
        self.recent.append((self.sampler.step, tuple(losses), each))
        if self.probe is not None:
            self.probe.backward(losses, null=null)
        elif losses:
            fabric.backward(torch.stack(list(losses.values())).sum())
        if self.replicas is not None:
            self.replicas.average_grads(dict(model.named_parameters()))
        if self.epoch == 1:
            self.reached.update(self._reached(batches))
        self.optimizer.step()
        self.total += each.sum()
        if len(self.recent) >= LOOK:
            self._look()
        if self.probe is not None and self.balancer is not None and self.balancer.rule.looks_again:
            with torch.no_grad(), undisturbed(model), fabric.autocast():
                self.probe.again(self.forward.losses(batches))

    def _reached(self, batches: Batches) -> set[str]:
        """Names of parameters that the losses of this step reach."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.forward.backend is None or len(self.absent) > 1:
            return {n for n, p in named.items() if p.grad is not None}
        if self.reached:
            return self.reached
        # A compiled graph gives zeros to parameters of which a plain one knows that they are not used.
        with undisturbed(self.model), self.fabric.autocast():
            losses = list(Forward(self.job.problem, self.model).losses(batches).values())
            if not losses:
                return set()
            found = torch.autograd.grad(torch.stack(losses).sum(), list(named.values()), allow_unused=True)
        return {n for n, g in zip(named, found, strict=True) if g is not None}

    def _look(self) -> None:
        """See whether the losses were finite; seldom, because this waits for the device.

        Raises:
            RunError: If one was not, on all processes; the tasks, the step and the way out are named.
        """
        if self.ranks.sum([float(not self.total.isfinite())])[0]:
            first = next(((s, t, v) for s, t, v in self.recent if not v.isfinite().all()), None)
            told = {}
            if first is not None:
                told = {t: v for t, v in zip(first[1], first[2].tolist(), strict=True) if not math.isfinite(v)}
            at = None if first is None else first[0]
            found = [(s, of) for s, of in self.ranks.gather((at, told)) if s is not None]
            self.ranks.first(lambda: self._refuse(found))
        self.recent.clear()

    def _refuse(self, found: list[tuple[int, dict[str, float]]]) -> None:
        step, worst = min(found, key=lambda one: one[0], default=(self.sampler.step, {}))
        worst = {t: v for at, of in found if at == step for t, v in of.items()}
        told = " and ".join(f"{v} for task {t!r}" for t, v in worst.items()) or "inf, as a sum over steps"
        recipe, steps = self.job.problem.recipe, self.sampler.steps
        if self.epoch == 1 and step == 1:
            hint = "It was so at once: look for a loss that divides by zero, for targets or inputs that are not finite"
        else:
            hint = f"Lower the learning rate (lr = {recipe.lr}), or look for a loss that divides by zero"
        raise RunError(
            f"{self.job.description}: the loss is {told} in epoch {self.epoch}, step {step} of {steps}. {hint}; "
            "`reconmtl check PROBLEM` looks at a batch of every task. Then repeat with --overwrite (or another --out)."
        )

    def _share(self, losses: dict[str, Tensor], batches: Batches, indices: Indices) -> bool:
        """Weigh the losses so that the processes' mean is that of all their samples; False if there is none at all."""
        counts = dict.fromkeys(self.absent, 0)
        for own, (_, targets) in batches.items():
            counts |= {t: len(indices[own]) if at is None else len(at) for t, (_, at) in targets.items()}
        machine = self.job.machine
        late = machine.checkpoint_seconds is not None and (
            time.perf_counter() - self.saved >= machine.checkpoint_seconds
        )
        *together, asked, due = self.ranks.sum([*counts.values(), float(was_asked()), float(late)])
        self.asked, self.due = asked > 0, due > 0
        for name, n in zip(counts, together, strict=True):
            self.absent[name] += n == 0
        if self.ranks.size > 1:
            for (name, mine), n in zip(counts.items(), together, strict=True):
                if name in losses and mine * self.ranks.size != n:
                    losses[name] = losses[name] * (mine * self.ranks.size / n)
        return any(together)

    def _evaluated(self, mean: float) -> dict[str, object]:
        """The epoch's line of the metrics file."""
        job, problem = self.job, self.job.problem
        entry: dict[str, object] = {"epoch": self.epoch, "tasks": list(problem.task_names), "loss": mean}
        if any(self.absent.values()):
            entry["absent"] = {t: n / self.sampler.steps for t, n in self.absent.items()}
        at = {math.ceil(problem.recipe.epochs * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        if job.stop is None and (self.epoch == self.epochs or (job.metrics is not None and self.epoch in at)):
            self.values = evaluate(problem, self.model, problem.test, machine=job.machine)
            entry["test"] = plain_values(self.values)
            if problem.val is not None:
                entry["val"] = plain_values(evaluate(problem, self.model, problem.val, machine=job.machine))
        return entry

    # Its state. -------------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self.asked:
            self._leave(interruption())
        steps = self.job.machine.checkpoint_steps
        done = (self.epoch - 1) * self.sampler.steps + self.sampler.step
        if self.due or (steps is not None and done % steps == 0):
            self._save()

    def _leave(self, asked: Interrupted) -> None:
        if self.job.checkpoint is None:
            raise asked
        self._save()
        where = f"epoch {self.epoch} of {self.epochs}, {self.job.checkpoint}"
        raise Interrupted(asked.signal, f"Saved in {where}. Repeat the command with --resume to go on.") from None

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.since

    def _save(self) -> None:
        if self.job.checkpoint is None:
            return
        self._look()  # what is saved can be continued
        about = {"epoch": self.epoch, "epochs": self.epochs, "seed": self.job.seed}
        path, state = self.job.checkpoint, self._state()
        self.ranks.share(self.model.buffers())
        self.ranks.first(lambda: save_checkpoint(path, self.model, about, training=state))
        self.saved = time.perf_counter()

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "stepped": self.stepped,
            "sampler": self.sampler.state(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch, "_step_count": self.schedule._step_count},
            "probe": None if self.probe is None else self.probe.state_dict(),
            "total": self.ranks.gather(self.total.cpu()),
            "absent": self.absent,
            "reached": sorted(self.reached),
            "values": self.values,
            "seconds": self._elapsed(),
            "written": self._written(),
            "random": self.ranks.gather(random_states()),
        }

    def _restore(self, found: Checkpoint, source: Path) -> None:
        try:
            self._take(found, source)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, ReconError) as error:
            told = str(error) if isinstance(error, ReconError) else f"{type(error).__name__}: {error}"
            raise RunError(
                f"{source} cannot be continued: {told} Delete this file to train from the beginning."
            ) from None

    def _take(self, found: Checkpoint, source: Path) -> None:
        if found.training is None:
            raise RunError("it holds a finished network, not the state of a training.")
        state = found.training["state"]
        if len(state["random"]) != self.ranks.size:
            raise RunError(f"it was made by {len(state['random'])} processes, now there are {self.ranks.size}.")
        restore_model(self.model, found, source)
        self.sampler.restore(state["sampler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # it was, before the stop; else PyTorch warns
        if (self.probe is None) != (state["probe"] is None):
            raise RunError("it was made with another setting of `record`.")
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])
        self.epoch, self.stepped = int(state["epoch"]), bool(state["stepped"])
        if not 1 <= self.epoch <= self.epochs + 1:
            raise RunError(f"field 'epoch' = {self.epoch} is not among 1 to {self.epochs + 1}.")
        self.total.copy_(state["total"][self.ranks.rank])
        self.absent = {t: int(state["absent"][t]) for t in self.absent}
        self.reached = set(state["reached"])
        self.values = {str(t): {str(m): float(v) for m, v in of.items()} for t, of in state["values"].items()}
        self.seconds, self.since = float(state["seconds"]), time.perf_counter()
        if self.epoch > self.epochs:
            self.end = int(state["written"])  # the file goes on with the lines of the next task's training
        else:
            self._cut(state["written"])
        set_random_states(state["random"][self.ranks.rank])  # last: nothing is drawn from here to the next step

    # The metrics file. ------------------------------------------------------------------------------------------------

    def _written(self) -> int:
        """Bytes of the metrics file."""
        path = self.job.metrics
        return path.stat().st_size if path is not None and path.exists() else 0

    def _cut(self, size: int) -> None:
        """Take back lines that were written after the checkpoint."""
        path = self.job.metrics
        if path is None:
            return
        if self._written() < size:
            raise RunError(f"{path} is shorter than when the checkpoint was written.")
        if path.exists() and self.ranks.rank == 0:
            os.truncate(path, size)

    def _write(self, entry: dict[str, object]) -> None:
        path = self.job.metrics
        if path is not None:
            self.ranks.first(lambda: append_json(path, entry))
