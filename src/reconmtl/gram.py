"""Task gradients -> per-layer Gram matrices; the only file that calls autograd for measuring.

One forward pass, one backward pass per task over the same graph. A task's pass computes the gradients of everything it
reaches: its heads (reached by nobody else) get theirs here and need no further pass, and the update of the shared part
is the sum of the rows whose Gram is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from reconmtl.errors import ProbeError
from reconmtl.layers import find_layers, match_layers

OPAQUE = {
    "CompiledFunctionBackward": "a region compiled by torch.compile hides which task reaches which parameter: "
    "name the shared layers with `shared=[...]`, or probe the model uncompiled",
    "CheckpointFunctionBackward": "re-entrant activation checkpointing cannot be differentiated per task: "
    "use `checkpoint(..., use_reentrant=False)`",
}


@dataclass(frozen=True)
class Segment:
    """Where one layer's parameters lie in the flat gradient buffer."""

    layer: str
    start: int
    stop: int
    tasks: tuple[int, ...]  # positions of the tasks that reach the layer


@dataclass(frozen=True)
class Layout:
    """What is shared in one graph, and where its gradients go."""

    tasks: tuple[str, ...]
    segments: tuple[Segment, ...]
    shared: tuple[tuple[str, nn.Parameter], ...]  # in buffer order
    reached: tuple[tuple[int, ...], ...]  # per task: positions in `shared` that it reaches
    exclusive: tuple[tuple[nn.Parameter, ...], ...]  # per task: parameters that it alone reaches
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> tuple[str, ...]:
        """Measured layers in network order."""
        return tuple(s.layer for s in self.segments)


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


def reach(losses: Sequence[Tensor], *, opaque: bool = False) -> dict[int, int]:
    """Find which losses reach which leaf tensors, by walking the autograd graph once.

    Args:
        losses: Scalars with a graph.
        opaque: True accepts graph nodes that hide what they compute.

    Returns:
        For each reached leaf, `id(leaf)` -> bit mask of the positions of the losses that reach it. What counts is
        reachability, not a nonzero gradient.
    """
    order: list[Node] = []
    children: dict[Node, list[Node]] = {}
    for loss in losses:
        assert loss.grad_fn is not None  # established by check_losses
        stack: list[tuple[Node, bool]] = [(loss.grad_fn, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in children:
                below = [n for n, _ in node.next_functions if n is not None]
                children[node] = below
                stack.append((node, True))
                stack.extend((n, False) for n in below if n not in children)
                if not opaque and (hint := OPAQUE.get(node.name())):
                    raise ProbeError(f"The graph contains {node.name()}: {hint}.")
    masks = dict.fromkeys(order, 0)
    for i, loss in enumerate(losses):
        masks[loss.grad_fn] |= 1 << i  # type: ignore[index]  # not None, see above
    for node in reversed(order):  # reversed postorder: every node before the ones it depends on
        mask = masks[node]
        for child in children[node]:
            masks[child] |= mask
    leaves = ((getattr(node, "variable", None), mask) for node, mask in masks.items())
    return {id(leaf): mask for leaf, mask in leaves if leaf is not None}


class Gradients:
    """Measures per-task gradients of one model; keeps the buffer between steps.

    Args:
        model: The network whose layers are measured; split models too.
        shared: Names or globs of the shared layers where the graph cannot tell (compiled regions); None finds them.
    """

    def __init__(self, model: nn.Module, *, shared: Iterable[str] | None = None) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ProbeError(
                "This model is wrapped in DistributedDataParallel, under which per-task gradients would silently stay "
                "local to each process. Probe the bare module (`model.module`) in one process."
            )
        lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
        if lazy:
            raise ProbeError(f"Parameter {lazy[0]!r} has no shape yet: run the model once on a batch before probing.")
        self.model = model
        self.layers = find_layers(model)
        self.forced = None if shared is None else set(match_layers(shared, [layer.name for layer in self.layers]))
        self._parameters = dict(model.named_parameters())
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._buffer: Tensor | None = None

    def layout(self, losses: Mapping[str, Tensor]) -> Layout:
        """Find what the given losses share; cached for graphs that share the same."""
        check_losses(losses)
        masks = reach(list(losses.values()), opaque=self.forced is not None)
        everyone = (1 << len(losses)) - 1
        found: list[tuple[str, int]] = []
        for layer in self.layers:
            for name in layer.parameters:
                parameter = self._parameters[name]
                mask = masks.get(id(parameter), 0)
                if self.forced is not None and layer.name in self.forced and parameter.requires_grad:
                    mask = everyone
                if mask:
                    found.append((name, mask))
        key = (tuple(losses), tuple(found))
        if key not in self._layouts:
            self._layouts[key] = self._build(tuple(losses), dict(found))
        return self._layouts[key]

    def _build(self, tasks: tuple[str, ...], masks: Mapping[str, int]) -> Layout:
        segments, shared, position = [], [], 0
        for layer in self.layers:
            names = [n for n in layer.parameters if _many(masks.get(n, 0))]
            if not names:
                continue
            start = position
            for n in names:
                shared.append((n, self._parameters[n]))
                position += self._parameters[n].numel()
            union = 0
            for n in names:
                union |= masks[n]
            reaching = tuple(i for i in range(len(tasks)) if union >> i & 1)
            segments.append(Segment(layer.name, start, position, reaching))
        every = [p for _, p in shared]
        kinds = {(p.device, p.is_complex()) for p in every}
        if len(kinds) > 1 or any(p.is_complex() for p in every):
            raise ProbeError(
                f"Shared parameters are complex or lie on several devices ({sorted(str(k[0]) for k in kinds)}); "
                "their gradients cannot be compared in one vector."
            )
        dtype = torch.float32
        for p in every:
            dtype = torch.promote_types(dtype, p.dtype)
        return Layout(
            tasks=tasks,
            segments=tuple(segments),
            shared=tuple(shared),
            reached=tuple(tuple(j for j, (n, _) in enumerate(shared) if masks[n] >> i & 1) for i in range(len(tasks))),
            exclusive=tuple(
                tuple(self._parameters[n] for n, m in masks.items() if m == 1 << i) for i in range(len(tasks))
            ),
            dtype=dtype,
            device=every[0].device if every else torch.device("cpu"),
        )

    def measure(
        self, losses: Mapping[str, Tensor], *, retain_graph: bool = False
    ) -> tuple[Layout, Tensor, list[list[Tensor | None]]]:
        """Run one backward pass per task.

        Args:
            losses: Scalar loss per task, all from one forward pass.
            retain_graph: Keep the graph for a further backward pass.

        Returns:
            The layout; the shared gradients [tasks, parameters], a buffer that the next call overwrites; and per task
            the gradients of the parameters that it alone reaches.
        """
        layout = self.layout(losses)
        self._refuse_hooks(layout)
        rows = self._rows(layout)
        own: list[list[Tensor | None]] = []
        sizes = [p.numel() for _, p in layout.shared]
        last = len(losses) - 1
        for i, loss in enumerate(losses.values()):
            inputs = [layout.shared[j][1] for j in layout.reached[i]]
            inputs += layout.exclusive[i]
            grads = torch.autograd.grad(loss, inputs, retain_graph=retain_graph or i < last, allow_unused=True)
            pieces = rows[i].split(sizes) if sizes else ()
            for j, grad in zip(layout.reached[i], grads, strict=False):
                if grad is None:
                    pieces[j].zero_()
                else:
                    dense = grad.to_dense() if grad.is_sparse else grad
                    pieces[j].view(dense.shape).copy_(dense)
            own.append(list(grads[len(layout.reached[i]) :]))
        return layout, rows, own

    def _rows(self, layout: Layout) -> Tensor:
        width = layout.segments[-1].stop if layout.segments else 0
        shape = (len(layout.tasks), width)
        buffer = self._buffer
        if buffer is None or buffer.shape != shape or buffer.dtype != layout.dtype or buffer.device != layout.device:
            self._buffer = buffer = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        elif any(len(r) < len(layout.shared) for r in layout.reached):
            buffer.zero_()  # rows of tasks that do not reach a parameter must be zero, whatever the last graph left
        return buffer

    def _refuse_hooks(self, layout: Layout) -> None:
        hooked = [n for n, p in layout.shared if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)]
        if hooked:
            raise ProbeError(
                f"Parameter {hooked[0]!r} has a gradient hook, which would see every task's gradient, not their sum. "
                "Remove it while probing, or act on `.grad` after `probe.backward`."
            )


def _many(mask: int) -> bool:
    return mask & (mask - 1) != 0


def grams(layout: Layout, rows: Tensor) -> Tensor:
    """Compute each layer's Gram matrix of task gradients.

    Args:
        layout: Where the layers lie.
        rows: Gradients [tasks, parameters].

    Returns:
        Inner products [layers, tasks, tasks] in the dtype of `rows`; NaN for tasks that do not reach the layer.
    """
    n = len(layout.tasks)
    out = rows.new_empty((len(layout.segments), n, n))
    with _full_precision(rows.device):
        for k, segment in enumerate(layout.segments):
            part = rows[:, segment.start : segment.stop]
            torch.mm(part, part.T, out=out[k])
            if len(segment.tasks) < n:
                absent = [i for i in range(n) if i not in segment.tasks]
                out[k, absent, :] = torch.nan
                out[k, :, absent] = torch.nan
    return out


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """TF32 would round inner products to ten bits; switch it off here, whatever the user set for training."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def accumulate(layout: Layout, rows: Tensor, own: Sequence[Sequence[Tensor | None]]) -> None:
    """Add the sum of the task gradients to `.grad`, as `sum(losses).backward()` does."""
    seen: set[int] = set()
    for parameters, grads in zip(layout.exclusive, own, strict=True):
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is None:
                continue
            # autograd may hand out one tensor for two parameters, or an expanded one: `.grad` must own its memory
            alias = not grad.is_sparse and (not grad.is_contiguous() or grad.data_ptr() in seen)
            _add_grad(parameter, grad.contiguous().clone() if alias else grad)
            if not grad.is_sparse:
                seen.add(grad.data_ptr())
    if layout.shared:
        total = rows.sum(0)
        for (_, parameter), piece in zip(
            layout.shared, total.split([p.numel() for _, p in layout.shared]), strict=True
        ):
            _add_grad(parameter, piece.view(parameter.shape).to(parameter.dtype))


def _add_grad(parameter: nn.Parameter, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad


def reference_grams(losses: Mapping[str, Tensor], layers: Mapping[str, Sequence[nn.Parameter]]) -> Tensor:
    """Compute Gram matrices slowly and obviously: one backward pass per task and layer, one dot product per pair.

    Args:
        losses: Scalar loss per task; their graph is kept.
        layers: Layer name -> its parameters.

    Returns:
        Inner products [layers, tasks, tasks], float64; gradients that do not exist count as zero.
    """
    vectors: list[list[Tensor]] = []
    for loss in losses.values():
        per_layer = []
        for parameters in layers.values():
            grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
            flat = [
                (torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)).double().flatten()
                for p, g in zip(parameters, grads, strict=True)
            ]
            per_layer.append(torch.cat(flat))
        vectors.append(per_layer)
    out = torch.empty(len(layers), len(losses), len(losses), dtype=torch.float64)
    for k in range(len(layers)):
        for i in range(len(losses)):
            for j in range(len(losses)):
                out[k, i, j] = torch.dot(vectors[i][k], vectors[j][k])
    return out
