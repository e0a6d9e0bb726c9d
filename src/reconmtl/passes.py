"""The passes of one measurement: heads first, then the shared part stage by stage, each layer reduced where it lies.

Each task's head is backpropagated only to where the shared part begins, and freed. Then the shared part follows in as
few stages as memory allows: within a stage one pass per task, then each layer's Gram matrix and the weighted sum of the
task gradients that is the update; the stage's memory serves the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from reconmtl.engines import Site, full_precision, rounds_to_tf32, site_gram
from reconmtl.errors import ProbeError
from reconmtl.graph import Graph, Shared, Stage, many

AGREE = {torch.float32: 2.5e-6, torch.float64: 1e-10}
"""Largest difference of a cosine, or relative one of a gradient, at which `delta` is trusted for a layer."""

KEEP = 2**30
"""Bytes of task gradients that are kept until weights are known that depend on all of them. Beyond, the gradients are
taken in stages for the weights alone, and one more backward pass makes the update."""


@dataclass(frozen=True)
class Segment:
    """Where one layer's parameters lie in the vector of all shared ones."""

    layer: str
    start: int
    stop: int
    tasks: tuple[int, ...]  # positions of the tasks that reach the layer


@dataclass(frozen=True)
class Layout:
    """What is shared in one graph, and where its gradients go."""

    tasks: tuple[str, ...]
    segments: tuple[Segment, ...]
    shared: tuple[tuple[str, nn.Parameter], ...]  # in order
    starts: tuple[int, ...]  # of each of them
    owner: tuple[int, ...]  # position in `segments` of each of them
    reached: tuple[frozenset[int], ...]  # per task: positions in `shared` that it reaches
    exclusive: tuple[tuple[nn.Parameter, ...], ...]  # per task: parameters that it alone reaches
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> tuple[str, ...]:
        """Measured layers in network order."""
        return tuple(s.layer for s in self.segments)

    @property
    def width(self) -> int:
        """Shared parameters."""
        return self.segments[-1].stop if self.segments else 0

    def at(self, j: int) -> slice:
        """Where the j-th shared parameter lies."""
        return slice(self.starts[j], self.starts[j] + real_numel(self.shared[j][1]))


def real_numel(tensor: Tensor) -> int:
    """Real numbers in a tensor: a complex element counts as two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor [...] as real and imaginary parts [..., 2], whose inner product is that of descent directions.

    A real tensor is returned as it is.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class Measured:
    """What one sweep found.

    Attributes:
        layout: What is shared.
        gram: Inner products [layers, tasks, tasks]; NaN for tasks that do not reach the layer.
        total: Weighted sum of the task gradients of the shared parameters, [parameters].
        sparse: Shared parameters, by position, whose gradients autograd makes sparse, with the rows [n] that any task's
            gradient touches.
        own: Per task the gradients of the parameters that it alone reaches.
        settle: To be called after a further backward pass over the same graph, see `buffers_once`.
        outside: Leaves of the graph that are no parameters of the model (a learned weight of a loss, an input), each
            with the gradient of the summed losses.
        missing: Shared parameters, by position, for which autograd had no gradient at all, not even zeros.
    """

    layout: Layout
    gram: Tensor
    total: Tensor
    sparse: dict[int, Tensor]
    own: list[list[Tensor | None]]
    settle: Callable[[], None]
    outside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    missing: frozenset[int] = frozenset()


@dataclass
class _Part:
    """What is taken in one stage, and the memory it is taken in."""

    stage: Stage
    flat: list[int]  # positions in `shared`
    sites: list[tuple[int, int | None, Site]]  # positions of weight and bias
    rows: Tensor = field(init=False)  # [tasks, parameters of `flat`]
    grads: list[Tensor] = field(init=False)  # per site [tasks, outputs, N]
    inputs: list[Tensor] = field(init=False)  # per site the layer's input

    def sizes(self, layout: Layout) -> list[int]:
        """Floats of the rows, and of the gradients at each site."""
        tasks = len(layout.tasks)
        rows = tasks * sum(real_numel(layout.shared[j][1]) for j in self.flat)
        return [rows, *(tasks * s.shape.outputs * s.shape.positions for _, _, s in self.sites)]

    def place(self, layout: Layout, space: Callable[[int], Tensor]) -> None:
        """Lay the stage's gradients out in one buffer."""
        tasks, sizes = len(layout.tasks), self.sizes(layout)
        self.inputs = [s.saved() for _, _, s in self.sites]
        first, *rest = space(sum(sizes)).split(sizes)
        self.rows = first.view(tasks, -1) if sizes[0] else first.new_empty(tasks, 0)
        self.grads = [
            r.view(tasks, s.shape.outputs, s.shape.positions) for r, (_, _, s) in zip(rest, self.sites, strict=True)
        ]


class Sweep:
    """One measurement: passes, stage by stage; holds the graph, so it lives no longer than the call."""

    def __init__(
        self,
        graph: Graph,
        layout: Layout,
        losses: Sequence[Tensor],
        *,
        sites: Mapping[int, Site],
        trusted: dict[tuple[str, int], bool],
        space: Callable[[int], Tensor],
        settle: Callable[[], None],
        memory: float,
        whole: bool,
        retain: bool,
        outside: Sequence[Tensor] = (),
    ) -> None:
        self.graph, self.layout, self.losses = graph, layout, losses
        self.leaves, self.outside = outside, list[tuple[Tensor, Tensor]]()
        self.trusted, self.space, self.settle, self.whole, self.retain = trusted, space, settle, whole, retain
        self.own: list[list[Tensor | None]] = [[] for _ in losses]
        self.touched: dict[int, list[Tensor]] = {}  # rows of sparse gradients, by position in `shared`
        self.dense: set[int] = set()  # positions in `shared` of which any gradient was dense
        self.found: set[int] = set()  # positions in `shared` whose gradient was found at the output of their layer
        position = {id(p): j for j, (_, p) in enumerate(layout.shared)}
        self.biases = {j: position[s.bias] for j, s in sites.items() if s.bias in position}
        hidden = sites.keys() | set(self.biases.values())
        self.flat = {
            graph.leaves[id(p)]: j
            for j, (_, p) in enumerate(layout.shared)
            if j not in hidden and id(p) in graph.leaves
        }
        self.at = {s.node: (j, self.biases.get(j), s) for j, s in sites.items()}
        self.shared = Shared(graph, [*self.flat, *self.at], whole=self.whole)
        self.pending: list[dict[tuple[Node, int], Tensor]] = [{} for _ in losses]
        self.parts = self._cut(memory)

    def _cut(self, memory: float) -> list[_Part]:
        if self.whole:  # the graph cannot be read: one stage with everything in it, from the losses down
            stage = Stage(frozenset(), (), ())
            return [_Part(stage, list(range(len(self.layout.shared))), [])]
        layout, tasks, itemsize = self.layout, len(self.losses), self.layout.dtype.itemsize

        def cost(node: Node) -> int:
            if node in self.at:
                j, _, site = self.at[node]
                held = tasks * site.shape.outputs * site.shape.positions
                if (layout.shared[j][0], tasks) not in self.trusted:
                    held += 2 * site.shape.outputs * site.shape.fan_in  # explicit gradients of two tasks, see `_trial`
                return held * itemsize
            return tasks * real_numel(layout.shared[self.flat[node]][1]) * itemsize

        def boundary(node: Node) -> int:
            sizes: list[int] = [math.prod(m.shape) for m in node._input_metadata]
            return tasks * itemsize * sum(sizes)

        parts = []
        for stage in self.shared.stages(cost, memory, boundary):
            flat = sorted(self.flat[n] for n in stage.wanted if n in self.flat)
            parts.append(_Part(stage, flat, [self.at[n] for n in stage.wanted if n in self.at]))
        return parts

    def run(self, weigh: Callable[[Tensor, Layout], Tensor] | None) -> Measured:
        """Measure everything; see `Gradients.sweep`."""
        layout, n, retain = self.layout, len(self.losses), self.retain
        keep = False  # whether the task gradients are kept until the weights, which depend on all layers, are known
        if weigh is not None:
            whole = self._cut(float("inf"))
            keep = sum(sum(part.sizes(layout)) for part in whole) * layout.dtype.itemsize <= KEEP or self.whole
            self.parts = whole if keep else self.parts
            self.retain = retain or not keep
        gram = torch.zeros((len(layout.segments), n, n), dtype=layout.dtype, device=layout.device)
        total = torch.empty(layout.width, dtype=layout.dtype, device=layout.device)
        taken: set[int] = set()
        self.space(
            max((sum(part.sizes(layout)) for part in self.parts), default=0)
        )  # once: growing it would scatter it
        for part in self.parts:
            self.fill(part)
            taken |= {*part.flat, *(j for site in part.sites for j in site[:2] if j is not None)}
            self._reduce(part, gram, total if weigh is None else None, None)
            if not keep:
                part.inputs.clear()
        mark_absent(layout, gram)
        if weigh is not None:
            weights = weigh(gram, layout).to(total)
            if keep:
                for part in self.parts:
                    self._reduce(part, None, total, weights)
            else:
                self._weighted(weights, total, retain)
        assert len(taken) == len(layout.shared)  # else parts of `total` would be whatever memory holds
        sparse = {j: torch.cat(rows).unique() for j, rows in self.touched.items() if j not in self.dense}
        missing = frozenset(range(len(layout.shared))) - self.touched.keys() - self.dense - self.found
        return Measured(layout, gram, total, sparse, self.own, self.settle, self.outside, missing)

    def at_features(self, weigh: Callable[[Tensor], Tensor]) -> Measured:
        """Weigh the tasks by their gradients where the shared part ends, and backpropagate once from there.

        Args:
            weigh: Turns inner products [tasks, tasks] into weights [tasks].

        Returns:
            The update; the only Gram matrix, [1, tasks, tasks], is that of the features.

        Raises:
            ProbeError: If some task's own part cannot be told from the shared one.
        """
        if self.whole or any(head is None for head in self.shared.heads):
            raise ProbeError("Where the shared part ends cannot be seen in this graph: balance at the weights.")
        layout, n = self.layout, len(self.losses)
        self._heads()
        keys = list(dict.fromkeys(key for pending in self.pending for key in pending))
        gram = torch.zeros((n, n), dtype=torch.float64)
        with full_precision(layout.device):
            for i, a in enumerate(self.pending):
                for j, b in enumerate(self.pending[: i + 1]):
                    common = [as_real(a[k]).flatten().dot(as_real(b[k]).flatten()) for k in keys if k in a and k in b]
                    gram[i, j] = gram[j, i] = sum((c.double().cpu() for c in common), torch.zeros(()).double())
        weights = weigh(gram).tolist()
        starts = []
        for key in keys:
            parts = [p[key] * w for p, w in zip(self.pending, weights, strict=True) if key in p]
            starts.append(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
        total = torch.zeros(layout.width, dtype=layout.dtype, device=layout.device)
        edges = [GradientEdge(*key) for key in keys]
        self._place(self._grad(edges, starts, [p for _, p in layout.shared], self.retain), total)
        return Measured(layout, gram[None], total, {}, self.own, self.settle)

    def _weighted(self, weights: Tensor, total: Tensor, retain: bool) -> None:
        """The update by one more backward pass, over the weighted losses."""
        loss = torch.stack([w * v for w, v in zip(weights.unbind(), self.losses, strict=True)]).sum()
        self._place(self._grad([loss], None, [p for _, p in self.layout.shared], retain), total)

    def _place(self, grads: Sequence[Tensor | None], total: Tensor) -> None:
        """Write the gradients of the shared parameters into the update."""
        for j, grad in enumerate(grads):
            place = total[self.layout.at(j)]
            if grad is None:
                place.zero_()
            else:
                place.copy_(as_real(grad.to_dense() if grad.is_sparse else grad).flatten())

    def fill(self, part: _Part) -> None:
        """Run every task's pass through one stage."""
        if part is self.parts[0]:
            if self.leaves:  # nobody measures them, so one pass for all tasks, which goes no further than they are
                grads = self._grad([torch.stack([v.sum() for v in self.losses]).sum()], None, self.leaves, True)
                self.outside = [(p, g) for p, g in zip(self.leaves, grads, strict=True) if g is not None]
            self._heads()
        while True:
            part.place(self.layout, self.space)
            trial = self._trial(part)
            after = self._passes(part, trial)
            doubted = [d for d, explicit in trial.items() if not self._agrees(part, d, explicit)]
            if not doubted:
                break
            part.flat = sorted([*part.flat, *(j for d in doubted for j in part.sites[d][:2] if j is not None)])
            part.sites = [s for d, s in enumerate(part.sites) if d not in doubted]
        if trial and not self.retain:  # the graph was kept for a second try: one more pass frees it
            i = max((i for i in range(len(self.losses)) if self._starts(part, i)), default=0)
            edges = [*(GradientEdge(s.node, 0) for _, _, s in part.sites), *part.stage.edges]
            outputs, cotangents = self._from(part, i)
            zeros = [torch.zeros_like(c) for c in cotangents or [self.losses[i]]]  # what hooks keep does not change
            self._grad(outputs, zeros, edges, False, self._root(i))
        for i, gradients in enumerate(after):
            for key in self._starts(part, i):
                self.pending[i].pop(key, None)
            for key, grad in gradients.items():
                self.pending[i][key] = self.pending[i][key] + grad if key in self.pending[i] else grad

    def _trial(self, part: _Part) -> dict[int, dict[int, list[Tensor]]]:
        """Sites that were never compared with `flat`, each with the two tasks whose explicit gradients will tell."""
        out: dict[int, dict[int, list[Tensor]]] = {}
        for d, (j, _, _) in enumerate(part.sites):
            if (self.layout.shared[j][0], len(self.losses)) not in self.trusted:
                tasks = [i for i in range(len(self.losses)) if j in self.layout.reached[i]][:2]
                out[d] = {i: [] for i in tasks}
        return out

    def _agrees(self, part: _Part, d: int, explicit: dict[int, list[Tensor]]) -> bool:
        """Compare two tasks' explicit gradients at a site with what `delta` makes of them; keep the answer."""
        j, bias, site = part.sites[d]
        saved, grads = part.inputs[d], part.grads[d][list(explicit)]
        k = max(range(len(grads)), key=lambda k: float(grads[k].norm()))  # one that is zero would prove nothing
        first = [*explicit.values()][k][0].flatten()
        with full_precision(first.device):
            measured = site_gram(site.input_gram(saved), grads, bias=bias is not None)
            expected = torch.stack(
                [
                    torch.stack([_inner(a, b) for b in explicit.values()])  # no copies: these are large
                    for a in explicit.values()
                ]
            )
            update = site.weight_gradient(saved, grads[k]).flatten()
        norms = expected.diagonal().sqrt()
        if not bool(norms.any()):
            return True  # zeros agree, but say nothing about the layer: ask again in the next step
        if not bool(expected.isfinite().all()):
            return False  # an overflow, as of scaled losses, says nothing about the layer: ask again in the next step
        bar = AGREE[self.layout.dtype]
        if first.is_cuda and rounds_to_tf32():
            bar = 5e-3  # `delta` is the more exact one
        agrees = bool(((measured - expected).abs() <= bar * norms * norms[:, None]).all())
        agrees = agrees and float(update.sub_(first).norm()) <= bar * float(first.norm())
        self.trusted[self.layout.shared[j][0], len(self.losses)] = agrees
        return agrees

    def _starts(self, part: _Part, i: int) -> list[tuple[Node, int]]:
        return [key for key in self.pending[i] if key[0] in part.stage.nodes]

    def _from(self, part: _Part, i: int) -> tuple[list[Tensor | GradientEdge], list[Tensor] | None]:
        """Where a task's pass through a stage starts: at its loss if its head could not be cut off."""
        if part is self.parts[0] and self.shared.heads[i] is None:
            return [self.losses[i]], None
        starts = self._starts(part, i)
        return [GradientEdge(*key) for key in starts], [self.pending[i][key] for key in starts]

    def _root(self, i: int) -> tuple[Node, int] | None:
        """Where the graph of a task's loss begins, if other losses are computed from it."""
        start, output = self.graph.starts[i]
        assert start is not None  # see check_losses
        return (start, output) if many(self.graph.masks[start]) else None

    def _heads(self) -> None:
        """Backpropagate what each task has for itself, to the edge of the shared part."""
        for i, (loss, head) in enumerate(zip(self.losses, self.shared.heads, strict=True)):
            if head is None:
                continue
            start, output = self.graph.starts[i]
            assert start is not None  # see check_losses
            if self._root(i) is not None:
                self.pending[i][start, output] = torch.ones_like(loss)
                continue
            keep = self.retain or self.graph.tied
            grads = self._grad([loss], None, [*head, *self.layout.exclusive[i]], keep)
            for edge, grad in zip(head, grads, strict=False):
                if grad is not None:
                    self.pending[i][edge.node, edge.output_nr] = grad
            self.own[i] = grads[len(head) :]

    def _passes(self, part: _Part, trial: dict[int, dict[int, list[Tensor]]]) -> list[dict[tuple[Node, int], Tensor]]:
        """Fill a stage's rows and gradients at sites; return, per task, the gradients where the stage ends."""
        layout, after = self.layout, []
        starts = [self._from(part, i) for i in range(len(self.losses))]
        active = [i for i, (outputs, _) in enumerate(starts) if outputs]
        for i, (outputs, cotangents) in enumerate(starts):
            flat = [j for j in part.flat if j in layout.reached[i]]
            sites = [d for d, (j, _, _) in enumerate(part.sites) if j in layout.reached[i]]
            checked = [d for d in trial if i in trial[d]]
            explicit = [j for d in checked for j in part.sites[d][:2] if j is not None]
            own = layout.exclusive[i] if cotangents is None else ()
            inputs: list[Tensor | GradientEdge] = [
                *(layout.shared[j][1] for j in [*flat, *explicit]),
                *(GradientEdge(part.sites[d][2].node, 0) for d in sites),
                *part.stage.edges,
                *own,
            ]
            keep = self.retain or bool(trial) or i not in active[-1:]
            grads = self._grad(outputs, cotangents, inputs, keep, self._root(i))
            self._store_rows(part, i, dict(zip(flat, grads, strict=False)))
            del grads[: len(flat)]
            for d in checked:
                for j in part.sites[d][:2]:
                    if j is not None:
                        grad = grads.pop(0)
                        trial[d][i].append(torch.zeros_like(layout.shared[j][1]) if grad is None else grad)
            at_sites = dict(zip(sites, grads, strict=False))
            del grads[: len(sites)]
            for d, (_, _, site) in enumerate(part.sites):
                delta = at_sites.get(d)
                if delta is None:
                    part.grads[d][i].zero_()
                else:
                    site.store(delta, part.grads[d][i])
                    self.found.update(j for j in part.sites[d][:2] if j is not None)
            edges = zip(part.stage.edges, grads, strict=False)
            after.append({(e.node, e.output_nr): g for e, g in edges if g is not None})
            if own:
                self.own[i] = grads[len(part.stage.edges) :]
        return after

    def _store_rows(self, part: _Part, i: int, grads: Mapping[int, Tensor | None]) -> None:
        found = [grads.get(j) for j in part.flat]
        plain = [g for g in found if g is not None and g.layout == torch.strided and g.dtype == part.rows.dtype]
        if plain and len(plain) == len(found):  # one call instead of one per parameter
            self.dense.update(part.flat)
            torch.cat([g.reshape(-1) for g in plain], out=part.rows[i])
            return
        sizes = [real_numel(self.layout.shared[j][1]) for j in part.flat]
        for j, piece in zip(part.flat, part.rows[i].split(sizes) if sizes else (), strict=True):
            grad = grads.get(j)
            if grad is None:
                piece.zero_()  # the buffer holds what an earlier stage or graph left there
                continue
            if grad.is_sparse and grad.sparse_dim() == 1:
                self.touched.setdefault(j, []).append(grad._indices()[0])
            else:
                self.dense.add(j)
            dense = as_real(grad.to_dense() if grad.is_sparse else grad)
            piece.view(dense.shape).copy_(dense)

    def _grad(
        self,
        outputs: Sequence[Tensor | GradientEdge],
        cotangents: Sequence[Tensor] | None,
        inputs: Sequence[Tensor | GradientEdge],
        retain: bool,
        root: tuple[Node, int] | None = None,
    ) -> list[Tensor | None]:
        """Differentiate; the gradients at edges are what hooks of the user on the tensor there have made of them.

        Where an earlier pass has ended, autograd would call those hooks a second time. So it is given zeros, which add
        nothing to what `retain_grad` keeps, and the gradient itself is put in behind the hooks. Where a pass goes on
        beyond an edge, autograd returns the gradient from before the hooks, so it is taken behind them.
        """
        if not outputs or not inputs:
            return [None] * len(inputs)
        resumed: dict[tuple[Node, int], Tensor] = {}
        given = list(cotangents or ())
        for k, (edge, grad) in enumerate(zip(outputs, given, strict=False)):
            if isinstance(edge, GradientEdge) and (edge.node, edge.output_nr) != root:
                resumed[edge.node, edge.output_nr] = grad
                given[k] = grad.new_zeros(()).expand_as(grad)
        handles = [node.register_prehook(_putting(k, grad)) for (node, k), grad in resumed.items()]
        passed: dict[tuple[Node, int], Tensor] = {}
        keys = [(e.node, e.output_nr) if isinstance(e, GradientEdge) else None for e in inputs]
        handles += [node.register_prehook(_taking(k, passed, node)) for node, k in filter(None, keys)]
        try:
            grads = torch.autograd.grad(outputs, inputs, given or None, retain_graph=retain, allow_unused=True)  # type: ignore[arg-type]
        finally:
            for handle in handles:
                handle.remove()
        self.settle()
        return [g if k is None else resumed.get(k, passed.get(k, g)) for k, g in zip(keys, grads, strict=True)]

    def _reduce(self, part: _Part, gram: Tensor | None, total: Tensor | None, weights: Tensor | None) -> None:
        """Add a stage's layers to the Grams, and write their part of the update."""
        layout, column = self.layout, 0
        with full_precision(layout.device):
            if gram is not None:
                for k, group in groupby(part.flat, key=lambda j: layout.owner[j]):
                    size = sum(real_numel(layout.shared[j][1]) for j in group)
                    rows = part.rows[:, column : column + size]
                    gram[k].addmm_(rows, rows.T)
                    column += size
            column = 0
            for run in _consecutive(part.flat):
                place = slice(layout.starts[run[0]], layout.at(run[-1]).stop)
                rows = part.rows[:, column : column + place.stop - place.start]
                column += rows.shape[1]
                if total is not None and weights is None:
                    torch.sum(rows, 0, out=total[place])
                elif total is not None and weights is not None:
                    torch.mv(rows.T, weights, out=total[place])
            for (j, bias, site), saved, grads in zip(part.sites, part.inputs, part.grads, strict=True):
                if gram is not None:
                    gram[layout.owner[j]] += site_gram(site.input_gram(saved), grads, bias=bias is not None)
                if total is not None:
                    summed = grads.sum(0) if weights is None else torch.tensordot(weights, grads, 1)
                    total[layout.at(j)].view(len(summed), -1).copy_(site.weight_gradient(saved, summed))
                    if bias is not None:
                        total[layout.at(bias)] = summed.sum(1)


def mark_absent(layout: Layout, gram: Tensor) -> None:
    """Write NaN into Gram matrices [layers, tasks, tasks] where a task does not reach a layer."""
    for k, segment in enumerate(layout.segments):
        for i in range(len(layout.tasks)):
            if i not in segment.tasks:  # one by one: an index tensor would have to be sent to the accelerator
                gram[k, i, :] = torch.nan
                gram[k, :, i] = torch.nan


def _putting(k: int, grad: Tensor) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that adds a gradient to the k-th which a node is given: another start of the pass may lead there too."""
    return lambda grads: (*grads[:k], grad if grads[k] is None else grads[k] + grad, *grads[k + 1 :])


def _taking(k: int, into: dict[tuple[Node, int], Tensor], node: Node) -> Callable[[tuple[Tensor, ...]], None]:
    """A hook that keeps the k-th gradient which a node is given, if there is one."""

    def take(grads: tuple[Tensor, ...]) -> None:
        if grads[k] is not None:
            into[node, k] = grads[k]

    return take


def _inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Inner product, in float64, of two gradients given parameter by parameter; in pieces, because they are large."""
    total = first[0].new_zeros((), dtype=torch.float64)
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.flatten().split(2**16), b.flatten().split(2**16), strict=True):
            total += torch.dot(x.double(), y.double())
    return total


def _consecutive(positions: list[int]) -> list[list[int]]:
    runs = [positions[:1]] if positions else []
    for before, here in pairwise(positions):
        if here == before + 1:
            runs[-1].append(here)
        else:
            runs.append([here])
    return runs
