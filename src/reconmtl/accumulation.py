"""Micro-batches of one training step: the Gram matrix of the accumulated gradient, not the sum of Gram matrices.

The inner product of two sums has terms across micro-batches, so the tasks' gradients themselves have to be kept until
the last one: tasks x (shared parameters) floats. From them follow the step's record, and the update of any balancer
that does not need the graph of a single forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reconmtl.engines import full_precision
from reconmtl.gram import Gradients, as_gradient, grams
from reconmtl.parallel import ParallelGradients, unite
from reconmtl.passes import Layout, Measured, as_real, mark_absent
from reconmtl.reduction import Reduction
from reconmtl.replicas import BUCKET

Weigh = Callable[[Tensor, Layout], Tensor]


def accumulation_of(gradients: Gradients) -> Accumulation:
    """Sums for what measures a model: in one process, or over those that train it together."""
    if isinstance(gradients, ParallelGradients):
        return ParallelAccumulation(gradients)
    return Accumulation(gradients)


class Accumulation:
    """Sums of the tasks' gradients; a task, or a layer, may be missing from any micro-batch.

    `sweep`, `explicit` and `mean_losses` are those of `Gradients`, for the whole step instead of one graph: what
    balances one batch also balances the sum of several.

    Args:
        gradients: Of the model whose gradients are summed.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._names = {id(p): n for n, p in gradients.parameters.items()}
        self._tasks: list[str] = []
        self._sums: dict[tuple[str, str], Tensor] = {}  # (parameter, task) -> [elements]
        self._losses: dict[str, Tensor] = {}
        self._touched: dict[str, list[Tensor]] = {}  # rows of sparse gradients, by parameter
        self._dense: set[str] = set()  # parameters of which any gradient was dense
        self._outside: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False, last: bool) -> Measured:
        """Measure one micro-batch and add it.

        Args:
            losses: Scalar loss per task, all from one forward pass.
            retain_graph: Keep the graph for a further backward pass.
            last: Whether the step ends with it; all processes of a group meet then.

        Returns:
            Its own gradients, summed over the tasks.
        """
        del last
        found, rows = self._gradients.explicit(losses, retain_graph=retain_graph)
        self._add(losses, found, rows)
        return found

    def _add(self, losses: Mapping[str, Tensor], found: Measured, rows: Tensor) -> None:
        layout = found.layout
        for i, task in enumerate(layout.tasks):
            self._tasks += [task] * (task not in self._tasks)
            value = losses[task].detach()
            self._losses[task] = self._losses[task] + value if task in self._losses else value
            for j in layout.reached[i]:
                self._keep(layout.shared[j][0], task, rows[i, layout.at(j)], layout.dtype)
            for parameter, grad in zip(layout.exclusive[i], found.own[i], strict=False):
                # alone in this micro-batch; another may bring a second task
                dense = torch.zeros_like(parameter) if grad is None else grad.to_dense()
                name = self._names[id(parameter)]
                self._keep(name, task, as_real(dense).flatten(), layout.dtype)
                if grad is not None and grad.is_sparse and grad.sparse_dim() == 1:
                    self._touched.setdefault(name, []).append(grad._indices()[0])
                elif grad is not None:
                    self._dense.add(name)
        for j, (name, _) in enumerate(layout.shared):
            if j in found.sparse:
                self._touched.setdefault(name, []).append(found.sparse[j])
            elif j not in found.missing:
                self._dense.add(name)
        for leaf, grad in found.outside:
            before = self._outside.get(id(leaf))
            self._outside[id(leaf)] = (leaf, grad if before is None else before[1] + grad)

    def _keep(self, name: str, task: str, grad: Tensor, dtype: torch.dtype) -> None:
        if (name, task) in self._sums:
            self._sums[name, task] += grad
        else:
            self._sums[name, task] = grad.to(dtype, copy=True)

    def gram(self) -> tuple[Layout, Tensor]:
        """What is shared in any of the micro-batches, and its Gram matrices [layers, tasks, tasks]."""
        layout = self._layout()
        return layout, self._reduced(layout, None)[0]

    # What a balancer asks of `Gradients`, for the whole step. ---------------------------------------------------------

    def sweep(
        self, losses: Mapping[str, Tensor], *, retain_graph: bool = False, weigh: Weigh | None = None
    ) -> Measured:
        """Grams of the whole step and the weighted sum of its gradients, see `Gradients.sweep`."""
        del losses, retain_graph
        layout = self._layout()
        return self._measured(layout, *self._reduced(layout, weigh or _sum))

    def explicit(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> tuple[Measured, Tensor]:
        """The whole step's gradients [tasks, parameters], see `Gradients.explicit`."""
        del losses, retain_graph
        layout = self._layout()
        rows = self._rows(layout)
        return self._measured(layout, grams(layout, rows), rows.sum(0)), rows

    def mean_losses(self, losses: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> dict[str, float]:
        """The whole step's losses, see `Gradients.mean_losses`."""
        del losses
        return self._gradients.mean_losses(self._losses, scale)

    def same_everywhere(self, vector: Tensor) -> Tensor:
        """See `Gradients.same_everywhere`."""
        return self._gradients.same_everywhere(vector)

    def add(self, found: Measured) -> None:
        """Add what was found to `.grad`."""
        self._gradients.add(found)

    # Over processes these differ. -------------------------------------------------------------------------------------

    def _layout(self) -> Layout:
        return self._gradients.layout_of(self._tasks, masks_of(self._tasks, self._sums))

    def _reduced(self, layout: Layout, weigh: Weigh | None) -> tuple[Tensor, Tensor]:
        """Grams, and the weighted sum if there are weights; parameter by parameter, without a second copy of all."""
        n = len(layout.tasks)
        gram = torch.zeros((len(layout.segments), n, n), dtype=layout.dtype, device=layout.device)
        total = torch.zeros(layout.width if weigh else 0, dtype=layout.dtype, device=layout.device)
        with full_precision(layout.device):
            for j, k in enumerate(layout.owner):
                rows = self._of(layout, j)
                gram[k].addmm_(rows, rows.T)
            mark_absent(layout, gram)
            if weigh is not None:
                weights = weigh(gram, layout).to(total)
                for j in range(len(layout.shared)):
                    total[layout.at(j)] = weights @ self._of(layout, j)
        return gram, total

    def _rows(self, layout: Layout) -> Tensor:
        """Everything, [tasks, parameters]."""
        rows = torch.zeros(len(layout.tasks), layout.width, dtype=layout.dtype, device=layout.device)
        for j in range(len(layout.shared)):
            rows[:, layout.at(j)] = self._of(layout, j)
        return rows

    def _of(self, layout: Layout, j: int) -> Tensor:
        """The gradients of one shared parameter, [tasks, elements]."""
        name, parameter = layout.shared[j]
        zero = as_real(torch.zeros_like(parameter)).flatten().to(layout.dtype)
        return torch.stack([self._sums.get((name, t), zero).to(layout.dtype) for t in layout.tasks])

    def _measured(self, layout: Layout, gram: Tensor, total: Tensor) -> Measured:
        sparse, missing = {}, set()
        for j, (name, _) in enumerate(layout.shared):
            if name in self._touched and name not in self._dense:
                sparse[j] = torch.cat(self._touched[name]).unique()
            elif name not in self._dense:
                missing.add(j)
        own = [[self._own(p, t) for p in ps] for t, ps in zip(layout.tasks, layout.exclusive, strict=True)]
        return Measured(layout, gram, total, sparse, own, lambda: None, [*self._outside.values()], frozenset(missing))

    def _own(self, parameter: nn.Parameter, task: str) -> Tensor | None:
        """The gradient of a parameter that one task reaches; sparse if it never was dense."""
        name = self._names[id(parameter)]
        if name in self._dense:
            return as_gradient(self._sums[name, task], parameter, None)
        if name in self._touched:
            return as_gradient(self._sums[name, task], parameter, torch.cat(self._touched[name]).unique())
        return None


class ParallelAccumulation(Accumulation):
    """Sums of several processes, averaged over them when the step ends.

    Args:
        gradients: Of the model, the same on every process.
    """

    _gradients: ParallelGradients

    def take(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False, last: bool) -> Measured:
        """Measure one micro-batch, in this process alone; see `Accumulation.take`."""
        try:
            found, rows = self._gradients.local(losses, retain_graph=retain_graph)
        except Exception as error:
            if last:
                self._gradients.replicas.agree(None, error)
            raise
        self._add(losses, found, rows)
        return found

    def _layout(self) -> Layout:
        replicas = self._gradients.replicas
        replicas.compare(self._gradients.model)
        found = [[n, mask] for n, mask in sorted(masks_of(self._tasks, self._sums).items())]
        together = unite(replicas.agree([list(self._tasks), found, [], False, False]))
        return self._gradients.layout_of(together.tasks, together.masks)

    def _reduced(self, layout: Layout, weigh: Weigh | None) -> tuple[Tensor, Tensor]:
        reduction = Reduction(self._gradients.replicas, layout, keep=weigh is not None, update=weigh is not None)
        reduction.take(range(len(layout.shared)), super()._rows(layout))
        reduction.finish(weigh, torch.zeros(0), None)
        return reduction.gram, reduction.total

    def _rows(self, layout: Layout) -> Tensor:
        rows = super()._rows(layout)
        for part in rows.view(-1).split(BUCKET // rows.dtype.itemsize):
            self._gradients.replicas.mean_(part)
        return rows

    def _measured(self, layout: Layout, gram: Tensor, total: Tensor) -> Measured:
        replicas = self._gradients.replicas
        everyone = replicas.agree([sorted(self._touched), sorted(self._dense)])
        dense = _union(d for _, d in everyone)
        only_sparse = _union(t for t, _ in everyone) - dense
        sparse = {
            j: (total[layout.at(j)].view(p.shape[0], -1) != 0).any(1).nonzero().squeeze(1)
            for j, (n, p) in enumerate(layout.shared)
            if n in only_sparse
        }
        missing = frozenset(j for j, (n, _) in enumerate(layout.shared) if n not in only_sparse | dense)
        of_one = [(p, t) for t, ps in zip(layout.tasks, layout.exclusive, strict=True) for p in ps]
        filled = [self._own(p, t) for p, t in of_one]
        means = replicas.means(
            [torch.zeros_like(p) if g is None else g for g, (p, _) in zip(filled, of_one, strict=True)]
        )
        found = iter(zip(means, (self._names[id(p)] for p, _ in of_one), strict=True))
        own: list[list[Tensor | None]] = []
        for ps in layout.exclusive:
            pairs = [next(found) for _ in ps]
            own.append(
                [None if n not in only_sparse | dense else m.to_sparse(1) if n in only_sparse else m for m, n in pairs]
            )
        outside = self._gradients.outside_means([*self._outside.values()])
        return Measured(layout, gram, total, sparse, own, lambda: None, outside, missing)

    def _own(self, parameter: nn.Parameter, task: str) -> Tensor | None:
        return super()._own(parameter, task) if (self._names[id(parameter)], task) in self._sums else None


def masks_of(tasks: Sequence[str], pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Bit masks, per parameter, of the positions of the tasks that reach it, from pairs (parameter, task)."""
    masks: dict[str, int] = {}
    for name, task in pairs:
        masks[name] = masks.get(name, 0) | 1 << tasks.index(task)
    return masks


def _sum(_: Tensor, layout: Layout) -> Tensor:
    return torch.ones(len(layout.tasks))


def _union(parts: Iterable[Iterable[str]]) -> set[str]:
    return {name for part in parts for name in part}
