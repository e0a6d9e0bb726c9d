"""Task gradients under data parallel training: several processes hold one model and average their gradients.

`autograd.grad` on a model under DistributedDataParallel gives the gradients of this process only, without a word. The
Gram matrix of averaged gradients is not the average of the processes' Gram matrices (cosines come out wrong by tenths),
so the task gradients themselves have to be averaged: reduced and scattered, every process holding the averages of a
share of the parameters (`reduction.py`). On a ring that moves (tasks + 1) / 2 times what averaging one gradient moves.

A process whose batch lacks a task sends zeros for it, as DistributedDataParallel counts it. Gradients are taken at the
weights: the Gram matrix of a mean does not follow from each process's activations and output gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reconmtl.errors import ProbeError
from reconmtl.gram import Gradients, grams, of_layers
from reconmtl.graph import Graph
from reconmtl.oracle import products, reference_vectors
from reconmtl.passes import Layout, Measured, Sweep, as_real, real_numel
from reconmtl.reduction import Reduction
from reconmtl.replicas import BUCKET, Replicas, find_replicas


@dataclass(frozen=True)
class Together:
    """What the processes will measure in a step.

    Attributes:
        same: Whether all of them have the same tasks, parameters and stages.
        tasks: All tasks, in the order of the first process that has them.
        masks: Parameter -> bit mask of the positions in `tasks` of those that reach it on any process.
        grads: Whether one of them has accumulated gradients that were not averaged yet.
    """

    same: bool
    tasks: tuple[str, ...]
    masks: dict[str, int]
    grads: bool


def unite(everyone: Sequence[Any]) -> Together:
    """Put together what the processes have described.

    Raises:
        ProbeError: If their tasks differ under synchronised batch normalisation, whose backward pass would wait for
            processes that have no such task.
    """
    grads = any(d[4] for d in everyone)
    tasks = list(dict.fromkeys(t for d in everyone for t in d[0]))
    masks: dict[str, int] = {}
    for d in everyone:
        position = [tasks.index(t) for t in d[0]]
        for name, mask in d[1]:
            moved = sum(1 << position[i] for i in range(len(position)) if mask >> i & 1)
            masks[name] = masks.get(name, 0) | moved
    uneven = any(a[0] != b[0] for a, b in pairwise(everyone))
    if uneven and any(d[3] for d in everyone):
        raise ProbeError(
            "The processes have different tasks in this step "
            f"({'; '.join(f'{r}: {d[0]}' for r, d in enumerate(everyone))}), and the model has SyncBatchNorm, whose "
            "backward pass waits for all of them. Draw batches in which every process has every task, or use "
            "BatchNorm or GroupNorm."
        )
    same = all(a[:3] == b[:3] for a, b in pairwise(everyone))
    return Together(same, tuple(tasks), masks, grads)


class _Step:
    """This process's passes, laid out as agreed with the others.

    Args:
        sweep: The passes; None if this process has no task.
        layout: What all processes together share.
        same: Whether that is what this process shares, stage by stage.
    """

    def __init__(self, sweep: Sweep | None, layout: Layout, *, same: bool) -> None:
        self.sweep, self.layout, self.same = sweep, layout, same
        self.failure: Exception | None = None
        self._found: dict[int, Tensor] = {}  # `id` of a parameter that one task reaches in this process -> gradient

    def settle(self) -> None:
        """See `Measured`."""
        if self.sweep is not None:
            self.sweep.settle()

    def stages(self) -> Iterator[tuple[Sequence[int], Tensor | None]]:
        """Run the passes; yields positions in the layout and rows, None from a failure on."""
        parts = [] if self.sweep is None else self.sweep.parts
        if self.same and self.sweep is not None:
            for part in parts:
                yield part.flat, self._rows(part)
            self._keep_own()
            return
        layout = self.layout
        rows = torch.zeros(len(layout.tasks), layout.width, dtype=layout.dtype, device=layout.device)
        for part in parts:
            self._spread(part.flat, self._rows(part), rows)
        self._keep_own()
        if self.sweep is not None and self.failure is None:
            where = {id(p): j for j, (_, p) in enumerate(layout.shared)}
            for task, parameters in zip(self.sweep.layout.tasks, self.sweep.layout.exclusive, strict=True):
                for p in parameters:
                    if id(p) in where and id(p) in self._found:  # another process has further tasks that reach it
                        grad = self._found[id(p)]
                        at = layout.at(where[id(p)])
                        rows[layout.tasks.index(task), at] = as_real(_dense(grad)).flatten().to(rows.dtype)
        yield range(len(layout.shared)), None if self.failure is not None else rows

    def _rows(self, part: Any) -> Tensor | None:  # noqa: ANN401 a stage of Sweep
        if self.failure is None:
            try:
                assert self.sweep is not None
                self.sweep.fill(part)
                rows: Tensor = part.rows
                return rows
            except Exception as error:  # the others are waiting: take part with zeros, then raise
                self.failure = error
        return None

    def _spread(self, flat: Sequence[int], found: Tensor | None, rows: Tensor) -> None:
        """Copy a stage's rows to where the common layout has them."""
        if found is None:
            return
        assert self.sweep is not None
        local, column = self.sweep.layout, 0
        where = {n: j for j, (n, _) in enumerate(self.layout.shared)}
        tasks = [self.layout.tasks.index(t) for t in local.tasks]
        for j in flat:
            name, parameter = local.shared[j]
            width = real_numel(parameter)
            rows[tasks, self.layout.at(where[name])] = found[:, column : column + width].to(rows.dtype)
            column += width

    def _keep_own(self) -> None:
        if self.sweep is not None and self.failure is None:
            for parameters, grads in zip(self.sweep.layout.exclusive, self.sweep.own, strict=True):
                self._found |= {id(p): g for p, g in zip(parameters, grads, strict=True) if g is not None}

    def own(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of a parameter that one task reaches."""
        return self._found.get(id(parameter))

    def kinds(self) -> Tensor:
        """Per parameter of the layout, shared ones first: whether its gradient here is sparse, and dense; [2, n]."""
        parameters = [p for _, p in self.layout.shared] + [p for ps in self.layout.exclusive for p in ps]
        out = torch.zeros(2, len(parameters))
        if self.sweep is None:
            return out
        names = [id(p) for _, p in self.sweep.layout.shared]
        sparse = {names[j] for j in self.sweep.touched} | {i for i, g in self._found.items() if g.is_sparse}
        dense = {names[j] for j in self.sweep.dense} | {i for i, g in self._found.items() if not g.is_sparse}
        for k, p in enumerate(parameters):
            out[0, k], out[1, k] = id(p) in sparse, id(p) in dense
        return out

    def only_sparse(self, kinds: Tensor) -> list[bool]:
        """Which parameters had sparse gradients wherever they had any, from the sums of `kinds` over the processes."""
        found: list[bool] = ((kinds[0] > 0) & (kinds[1] == 0)).tolist()
        return found


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def _empty(losses: object) -> bool:
    return isinstance(losses, Mapping) and not losses


def accumulated(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether any `.grad` holds something already; zeros do not count."""
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    counts = [torch.count_nonzero(g._values() if g.is_sparse else g) for g in grads]
    return bool(counts) and bool(torch.stack([c.cpu() for c in counts]).any())


def gradients_of(model: nn.Module, *, group: Any = None, **options: Any) -> Gradients:  # noqa: ANN401 checked below
    """Choose what measures a model: in one process, or together with the others that train it.

    Args:
        model: Bare, or in its wrapper.
        group: See `find_replicas`.
        **options: Of `Gradients`.

    Returns:
        `Gradients`, or `ParallelGradients` if several processes average theirs.
    """
    bare, replicas = find_replicas(model, group)
    if replicas is None:
        return Gradients(bare, alone=group is False, **options)
    return ParallelGradients(bare, replicas, **options)


class ParallelGradients(Gradients):
    """Measures the task gradients that the averages over all processes give; every process has to call it.

    Args:
        model: The bare network, the same on every process.
        replicas: The processes.
        **options: Of `Gradients`; layers are measured by "flat" whatever `engine` says.
    """

    def __init__(self, model: nn.Module, replicas: Replicas, **options: Any) -> None:  # noqa: ANN401 passed on
        super().__init__(model, alone=True, **options)
        self.replicas = replicas
        self._accumulated = False  # whether a process came to the last step with gradients in `.grad`

    @property
    def synchronises(self) -> bool:
        """Whether gradients of this step are averaged: not inside the wrapper's `no_sync()`."""
        return self.replicas.synchronises

    def sweep(
        self,
        losses: Mapping[str, Tensor],
        *,
        retain_graph: bool = False,
        weigh: Callable[[Tensor, Layout], Tensor] | None = None,
    ) -> Measured:
        """Measure every shared layer once, see `Gradients.sweep`; an empty `losses` sends zeros."""
        step, layout = self._plan(losses, retain_graph, self.memory)
        reduction = Reduction(self.replicas, layout, keep=weigh is not None)
        for positions, rows in step.stages():
            reduction.take(positions, rows)
        only_sparse = step.only_sparse(reduction.finish(weigh, step.kinds(), step.failure))
        return self._measured(step, reduction.gram, reduction.total, only_sparse)

    def explicit(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> tuple[Measured, Tensor]:
        """Average every task's gradient over the processes, see `Gradients.explicit`; 2 x tasks x parameters move."""
        step, layout = self._plan(losses, retain_graph, float("inf"))
        ((_, rows),) = step.stages()
        only_sparse = step.only_sparse(Reduction(self.replicas, layout).finish(None, step.kinds(), step.failure))
        assert rows is not None  # a failure has been raised
        for part in rows.view(-1).split(BUCKET // rows.dtype.itemsize):
            self.replicas.mean_(part)
        return self._measured(step, grams(layout, rows), rows.sum(0), only_sparse), rows

    def local(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> tuple[Measured, Tensor]:
        """Take every task's gradient in this process only, see `Gradients.explicit`; nobody is waited for."""
        if self.replicas.wrapper is None and _empty(losses):
            layout = self.layout_of((), {})
            nothing = torch.zeros(0, device=layout.device)
            return Measured(layout, nothing, nothing, {}, [], lambda: None), nothing
        self._refuse_empty(losses)
        found, rows = super().explicit(losses, retain_graph=retain_graph)
        self.replicas.refuse(found.layout)
        return found, rows

    def add(self, found: Measured) -> None:
        """Add what a sweep found to `.grad`; what was accumulated there without averaging is averaged first."""
        if self._accumulated:
            self._accumulated = False
            self.average()
        super().add(found)

    def average(self) -> None:
        """Average `.grad` over the processes."""
        self.replicas.average_grads({**self.parameters, **{f"outside: {n}": p for n, p in self._beyond().items()}})

    def mean_losses(self, losses: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> dict[str, float]:
        """The losses' values, averaged over all processes as the gradients are: one that lacks a task has zero."""
        try:
            mine = {} if _empty(losses) else super().mean_losses(losses, scale)
        except Exception as error:
            self.replicas.agree(None, error)
            raise
        everyone = self.replicas.agree(["losses", [[t, v.hex()] for t, v in mine.items()]])
        found: dict[str, list[float]] = {}
        for _, pairs in everyone:
            for task, value in pairs:
                found.setdefault(task, []).append(float.fromhex(value))
        return {t: sum(v) / len(everyone) for t, v in found.items()}

    def same_everywhere(self, vector: Tensor) -> Tensor:
        """What the first process has made, in which random numbers were drawn."""
        there = vector.to(next(iter(self.parameters.values())).device)
        dist.broadcast(there, group=self.replicas.group, group_src=0)
        return there.to(vector.device)

    def backward(self, losses: Mapping[str, Tensor], *, last: bool = True) -> None:
        """Run one ordinary backward pass; the wrapper averages `.grad`, or the last pass of a step does."""
        if self.replicas.wrapper is not None:
            self._refuse_empty(losses)
            super().backward(losses)
            return
        failure: Exception | None = None
        if last:
            self.replicas.compare(self.model)
        try:
            if not _empty(losses):
                super().backward(losses)
        except Exception as error:
            failure = error
        if last:
            self.replicas.average_grads(self.parameters, failure)
        elif failure is not None:
            raise failure

    def reference(self, losses: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """Compute the Gram matrices slowly, from averages of whole gradients; see `Gradients.reference`."""
        vectors = []
        for task in layout.tasks:
            loss = losses.get(task)
            layers = of_layers(layout)
            if loss is None:
                local = [torch.cat([as_real(torch.zeros_like(p)).double().flatten() for p in ps]) for ps in layers]
            else:
                local = reference_vectors(loss, layers)
            vectors.append(self.replicas.means(local))
        return products(vectors)

    def reference_update(self, losses: Mapping[str, Tensor], layout: Layout) -> list[Tensor]:
        """The gradient of the summed losses, averaged over the processes; see `Gradients.reference_update`."""
        if not _empty(losses):
            return self.replicas.means(super().reference_update(losses, layout))
        zeros = [torch.cat([as_real(torch.zeros_like(p)).double().flatten() for p in ps]) for ps in of_layers(layout)]
        return self.replicas.means(zeros)

    def _plan(self, losses: Mapping[str, Tensor], retain: bool, memory: float) -> tuple[_Step, Layout]:
        """Prepare this process's passes, and agree with the others on what will be sent."""
        self.replicas.compare(self.model)
        sweep: Sweep | None = None
        tasks: tuple[str, ...] = ()
        found: list[tuple[str, int]] = []
        synchronous = False
        try:
            self._refuse_empty(losses)
            if not _empty(losses):
                graph, layout = self._read(losses)
                self._refuse_hooks(layout)
                self.replicas.refuse(layout)
                sweep = self._make(graph, layout, losses, {}, retain, memory)
                tasks, found = layout.tasks, self._masks(layout)
                synchronous = any("SyncBatchNorm" in node.name() for node in graph.order)
        except Exception as error:
            self.replicas.agree(None, error)
            raise
        stages = [] if sweep is None else [part.flat for part in sweep.parts]
        mine = [list(tasks), [list(f) for f in found], stages, synchronous, accumulated(self.parameters)]
        together = unite(self.replicas.agree(mine))
        self._accumulated = together.grads
        united = self.layout_of(together.tasks, together.masks)
        size = self.replicas.size
        self.engines.update(dict.fromkeys(united.layers, f"flat (gradients are averaged over {size} processes)"))
        return _Step(sweep, united, same=together.same), united

    def _masks(self, layout: Layout) -> list[tuple[str, int]]:
        """Which tasks reach each parameter, as bit masks of positions; parameters that none reaches are left out."""
        masks: dict[int, int] = {}
        for i in range(len(layout.tasks)):
            for p in [*(layout.shared[j][1] for j in layout.reached[i]), *layout.exclusive[i]]:
                masks[id(p)] = masks.get(id(p), 0) | 1 << i
        return [(n, masks[id(p)]) for n, p in self.parameters.items() if id(p) in masks]

    def _measured(self, step: _Step, gram: Tensor, total: Tensor, only_sparse: Sequence[bool]) -> Measured:
        """Average what each task has for itself, and put everything together."""
        layout = step.layout
        sparse = {
            j: (total[layout.at(j)].view(p.shape[0], -1) != 0).any(1).nonzero().squeeze(1)
            for j, (_, p) in enumerate(layout.shared)
            if only_sparse[j]
        }
        parameters = [p for ps in layout.exclusive for p in ps]
        local = [step.own(p) for p in parameters]
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, local, strict=True)]
        means = zip(self.replicas.means(filled), only_sparse[len(layout.shared) :], strict=True)
        found = iter([m.to_sparse(1) if s else m for m, s in means])
        own: list[list[Tensor | None]] = [[next(found) for _ in ps] for ps in layout.exclusive]
        outside = self.outside_means([] if step.sweep is None else step.sweep.outside)
        return Measured(layout, gram, total, sparse, own, step.settle, outside)

    def _beyond(self) -> dict[str, nn.Parameter]:
        """Parameters that the wrapper averages although the probed model does not hold them."""
        w, mine = self.replicas.wrapper, {id(p) for p in self.parameters.values()}
        if w is None:
            return {}
        return {n: p for n, p in w.module.named_parameters() if id(p) not in mine and n not in w.parameters_to_ignore}

    def outside_means(self, outside: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Average what the wrapper averages, see `average_grads`; other leaves stay local, as in a plain step."""
        beyond = self._beyond()
        if not beyond:
            return outside
        mine = {id(p): g for p, g in outside}
        anyone = set().union(*self.replicas.agree([n for n, p in beyond.items() if id(p) in mine]))
        chosen = [p for n, p in beyond.items() if n in anyone]
        means = self.replicas.means([mine.pop(id(p), torch.zeros_like(p)) for p in chosen])
        return [*zip(chosen, means, strict=True), *((p, g) for p, g in outside if id(p) in mine)]

    def _outside(self, graph: Graph) -> list[Tensor]:
        found = super()._outside(graph)
        alone = [p for p in found if isinstance(p, nn.Parameter)]
        if alone and self.replicas.wrapper is None:
            raise ProbeError(
                f"The losses depend on a parameter of shape {list(alone[0].shape)} outside the probed model, whose "
                "gradient nobody averages over the processes. Probe a module that holds all of them."
            )
        return found

    def _refuse_empty(self, losses: Mapping[str, Tensor]) -> None:
        if self.replicas.wrapper is not None and _empty(losses):
            raise ProbeError(
                "No task has a loss in this process, and under DistributedDataParallel the others would wait for it. "
                "Pass zero, e.g. `{task: 0 * output.sum()}`; or train without the wrapper, `Probe(model, group=...)`."
            )
