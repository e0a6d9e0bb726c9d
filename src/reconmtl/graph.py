"""What autograd's graph says before any gradient is taken: who reaches what, where it can be cut.

The graph of the losses is all there is to read: no hook is registered and nothing is wrapped, so nothing can be left
behind, in the user's model or anywhere else. Nodes are held for the time of one call only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from reconmtl.errors import ProbeError

COMPILED = "CompiledFunctionBackward"
OPAQUE = {
    COMPILED: "a region compiled by torch.compile, with outputs that different tasks use, hides which task reaches "
    "which parameter: name the shared layers with `shared=[...]`, compile the shared part alone, or probe the model "
    "uncompiled",
    "CheckpointFunctionBackward": "re-entrant activation checkpointing cannot be differentiated per task: "
    "use `checkpoint(..., use_reentrant=False)`",
}


def check_losses(losses: Mapping[str, Tensor]) -> None:
    """Raise a ProbeError that lists every loss which cannot be differentiated."""
    faults = []
    if not isinstance(losses, Mapping) or not losses:
        raise ProbeError(f"Expected the losses as {{task: scalar tensor}}, got {type(losses).__name__} {losses!r:.80}.")
    for task, loss in losses.items():
        if not isinstance(loss, Tensor):
            faults.append(f"task {task!r}: expected a scalar tensor, got {type(loss).__name__}")
        elif loss.numel() != 1:
            faults.append(f"task {task!r}: expected a scalar, got shape {list(loss.shape)}; reduce it, e.g. `.mean()`")
        elif loss.grad_fn is None:
            faults.append(f"task {task!r}: the loss depends on no parameter that requires a gradient")
    if faults:
        raise ProbeError("These losses cannot be probed: " + "; ".join(faults) + ".")


class Graph:
    """One walk over the autograd graph of several losses.

    Args:
        losses: Scalars with a graph.
        opaque: True accepts graph nodes that hide what they compute. A compiled region all of whose outputs serve the
            same tasks hides nothing.

    Attributes:
        order: Every node before the ones it depends on: losses first, leaves last.
        masks: Per node, a bit mask of the positions of the losses that reach it.
        uses: Per node, the nodes that its result flows into, each with the position of the argument.
        leaves: `id(leaf tensor)` -> the node that accumulates its gradient.
        tied: Whether passes from several losses execute one node that cannot be executed again once a pass has freed
            the graph, see `_through`.
        starts: Per loss, the node that computes it and the position among that node's outputs.
    """

    def __init__(self, losses: Sequence[Tensor], *, opaque: bool = False) -> None:
        order: list[Node] = []
        self.children: dict[Node, list[tuple[Node, int, int]]] = {}  # (node, its output, our argument)
        self.tied = any(loss.grad_fn is not None and _is_sink(loss.grad_fn) for loss in losses)
        self.starts = [_through(loss.grad_fn, loss.output_nr) for loss in losses]
        for start, _ in self.starts:
            assert start is not None  # established by check_losses
            stack: list[tuple[Node, bool]] = [(start, False)]
            while stack:
                node, done = stack.pop()
                if done:
                    order.append(node)
                elif node not in self.children:
                    edges = [_through(n, k) for n, k in node.next_functions]
                    self.tied = self.tied or any(n is not None and _is_sink(n) for n, _ in node.next_functions)
                    below = [(n, k, i) for i, (n, k) in enumerate(edges) if n is not None]
                    self.children[node] = below
                    stack.append((node, True))
                    # The first argument goes deepest (it is the layer's input), so that a weight's own small branch
                    # comes right after its layer in `order` and not after the whole network.
                    stack.extend((n, False) for n, _, _ in reversed(below) if n not in self.children)
                    if not opaque and node.name() in OPAQUE and node.name() != COMPILED:
                        raise ProbeError(f"The graph contains {node.name()}: {OPAQUE[node.name()]}.")
        order.reverse()
        self.order = order
        self.roots = [start for start, _ in self.starts]
        self.masks = dict.fromkeys(order, 0)
        self.uses: dict[Node, list[tuple[Node, int]]] = {node: [] for node in order}
        self.leaves: dict[int, Node] = {}
        for i, (start, _) in enumerate(self.starts):
            self.masks[start] |= 1 << i  # type: ignore[index]  # not None, see above
        for node in order:
            mask = self.masks[node]
            for child, _, argument in self.children[node]:
                self.masks[child] |= mask
                self.uses[child].append((node, argument))
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                self.leaves[id(leaf)] = node
        if not opaque:
            self._refuse_divided()

    def _refuse_divided(self) -> None:
        """Raise a ProbeError if a compiled region has outputs that different tasks use."""
        compiled = [node for node in self.order if node.name() == COMPILED]
        for node in compiled:
            outputs: dict[int, int] = {}  # position of an output -> which losses it serves
            for parent in {p for p, _ in self.uses[node]}:
                for child, output, _ in self.children[parent]:
                    if child is node:
                        outputs[output] = outputs.get(output, 0) | self.masks[parent]
            for i, (start, output) in enumerate(self.starts):
                if start is node:
                    outputs[output] = outputs.get(output, 0) | 1 << i
            if len(set(outputs.values())) > 1:
                raise ProbeError(f"The graph contains {COMPILED}: {OPAQUE[COMPILED]}.")

    def mask(self, leaf: Tensor) -> int:
        """Which losses reach a leaf tensor; what counts is reachability, not a nonzero gradient."""
        node = self.leaves.get(id(leaf))
        return 0 if node is None else self.masks[node]


def _is_sink(node: Node) -> bool:
    return node.name() == "_DDPSinkBackward"


def _through(node: Node | None, output: int) -> tuple[Node | None, int]:
    """Follow an edge through what DistributedDataParallel may put behind every output of the model.

    That node hands each gradient on unchanged, but it is one node for all outputs, so every task would seem to reach
    every parameter.
    """
    while node is not None and _is_sink(node):
        needed = list(node.needs_input_grad)[1:]  # type: ignore[attr-defined]  # the first input is the wrapper itself
        inputs = [edge for edge in node.next_functions if edge[0] is not None]
        node, output = inputs[sum(needed[:output])] if needed[output] else (None, 0)
    return node, output


def reach(losses: Sequence[Tensor], *, opaque: bool = False) -> dict[int, int]:
    """Find which losses reach which leaf tensors.

    Args:
        losses: Scalars with a graph.
        opaque: True accepts graph nodes that hide what they compute.

    Returns:
        For each reached leaf, `id(leaf)` -> bit mask of the positions of the losses that reach it.
    """
    graph = Graph(losses, opaque=opaque)
    return {leaf: graph.masks[node] for leaf, node in graph.leaves.items()}


def many(mask: int) -> bool:
    """Whether a mask has more than one bit, that is: whether two tasks reach it."""
    return mask & (mask - 1) != 0


@dataclass(frozen=True)
class Stage:
    """A stretch of the shared part that is backpropagated, reduced and freed before the next.

    Attributes:
        nodes: What each task's pass through the stage executes.
        edges: Where the gradient leaves it: the passes of the next stages start here.
        leaves: Leaves and outputs of layers whose gradients are taken in this stage, as given to `stages`.
    """

    nodes: frozenset[Node]
    edges: tuple[GradientEdge, ...]
    wanted: tuple[Node, ...]


class Shared:
    """The part of a graph that several tasks share, and where it can be cut.

    A pass that captures the gradient at one node stops there only if the node leads to nothing else that the pass is
    asked for: what bypasses a cut (a skip connection, a tied weight) would silently be counted twice. So a cut is valid
    only where a single node is captured and no wanted leaf is used on both sides. This is checked, never assumed.

    Args:
        graph: Of the losses.
        wanted: Nodes at which gradients are taken: leaves, and outputs of layers.
        whole: True takes every task's pass in one piece, whatever the graph looks like.
    """

    def __init__(self, graph: Graph, wanted: Iterable[Node], *, whole: bool = False) -> None:
        self.graph = graph
        self.wanted = set(wanted)
        needed: set[Node] = set(self.wanted)
        for node in reversed(graph.order):
            if any(child in needed for child, _, _ in graph.children[node]):
                needed.add(node)
        self.needed = needed
        shared = [n for n in graph.order if many(graph.masks[n]) and n in needed and not _is_leaf(n)]
        self.position = {n: i for i, n in enumerate(shared)}
        self.heads: list[tuple[GradientEdge, ...] | None] = []
        tasks = len(graph.roots)
        entries: list[set[tuple[Node, int]]] = [set() for _ in range(tasks)]
        tied: list[bool] = [whole] * tasks
        for node in graph.order:
            mask = graph.masks[node]
            if many(mask):
                continue
            i = mask.bit_length() - 1
            for child, output, _ in graph.children[node]:
                if many(graph.masks[child]) and child in needed:
                    if _is_leaf(child):
                        tied[i] = True
                    else:
                        entries[i].add((child, output))
        for i, root in enumerate(graph.roots):
            if many(graph.masks[root]):  # type: ignore[index]
                self.heads.append(() if not whole else None)  # the loss itself is shared: there is no head
            elif tied[i] or len({n for n, _ in entries[i]}) > 1:
                self.heads.append(None)
            else:
                self.heads.append(tuple(GradientEdge(n, k) for n, k in sorted(entries[i], key=lambda e: e[1])))
        self.whole = whole

    def stages(
        self, cost: Callable[[Node], int], limit: float, boundary: Callable[[Node], int] = lambda _: 0
    ) -> list[Stage]:
        """Cut the shared part so that what the wanted nodes of a stage cost stays within a limit where it can.

        Args:
            cost: Of keeping the gradients of all tasks at a wanted node.
            limit: Largest sum per stage; a single node that costs more makes a stage of its own at best. With 0 the
                graph is cut wherever it can be.
            boundary: Cost of carrying the gradients of all tasks across a cut behind a node. A cut that costs more than
                the limit, and more than it frees, is not made.
        """
        every = [n for n in self.graph.order if n in self.wanted and many(self.graph.masks[n])]
        if sum(map(cost, every)) <= limit:
            return [Stage(frozenset(self.position), (), tuple(every))]
        n = max(len(self.position), 1)  # behind a split of the first layer nothing is shared but parameters
        where: dict[Node, int] = {}
        blocked = [0] * (n + 1)  # cut p separates positions < p from positions >= p
        crossing = [0] * (n + 1)
        carried = [0] * (n + 1)
        uncut = [head is None for head in self.heads]
        for node, uses in self.graph.uses.items():
            if node not in self.needed or not many(self.graph.masks[node]):
                continue
            at = [
                self.position.get(parent, 0)
                for parent, _ in uses
                if parent in self.position or uncut[self.graph.masks[parent].bit_length() - 1]
            ]
            leaf = _is_leaf(node)
            if node in self.wanted:
                where[node] = (max(at) if at else 0) if leaf else self.position[node]
            if not at:
                continue
            spans = blocked if leaf else crossing
            last = max(at) if leaf else self.position[node]
            size = 0 if leaf or not limit else boundary(node)
            spans[min(at) + 1] += 1
            carried[min(at) + 1] += size
            if last + 1 <= n:
                spans[last + 1] -= 1
                carried[last + 1] -= size
        costs = [0] * n
        for node, p in where.items():
            costs[p] += cost(node)
        cuts, total, best, inside, over = [0], 0, 0, 0, 0
        since_best = across = 0
        for p in range(n):
            inside += crossing[p]
            over += blocked[p]
            across += carried[p]
            if p > cuts[-1] and inside <= 1 and over == 0 and across <= max(limit, total):
                best, since_best = p, 0
            if costs[p] and total + costs[p] > limit and total > since_best:  # something lies before the cut
                cuts.append(best)
                total = since_best
            total += costs[p]
            since_best += costs[p]
        return [self._stage(a, b, where) for a, b in zip(cuts, [*cuts[1:], n], strict=True)]

    def _stage(self, start: int, stop: int, where: Mapping[Node, int]) -> Stage:
        nodes = [n for n, p in self.position.items() if start <= p < stop]
        edges: dict[tuple[Node, int], GradientEdge] = {}
        if stop < len(self.position):
            for node in nodes if start else self._first(nodes):
                for child, output, _ in self.graph.children[node]:
                    if self.position.get(child, -1) >= stop:
                        edges.setdefault((child, output), GradientEdge(child, output))
        wanted = tuple(n for n, p in where.items() if start <= p < stop)
        return Stage(frozenset(nodes), tuple(edges.values()), wanted)

    def _first(self, nodes: list[Node]) -> list[Node]:
        """The first stage also runs the heads that could not be cut off."""
        uncut = [i for i, head in enumerate(self.heads) if head is None]
        return nodes + [n for n in self.graph.order if any(self.graph.masks[n] == 1 << i for i in uncut)]


def _is_leaf(node: Node) -> bool:
    return getattr(node, "variable", None) is not None
