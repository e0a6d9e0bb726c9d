"""Task gradients -> per-layer Gram matrices; what is shared, how it is taken, what comes of it.

One forward pass, one backward pass per task over the same graph (`passes.py`). Per layer the gradient is taken at the
weight (`flat`) or at the layer's output (`delta`, see `engines.py`). Neither needs a further pass for the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.buffers import buffers_once
from reconmtl.engines import Site, find_site, full_precision, pays, site_floats
from reconmtl.errors import ProbeError, RunError
from reconmtl.graph import Graph, check_losses, many, reach
from reconmtl.layers import ROOT, find_layers, match_layers
from reconmtl.oracle import reference_grams, reference_vectors
from reconmtl.passes import Layout, Measured, Segment, Sweep, mark_absent, real_numel
from reconmtl.replicas import refuse_alone

__all__ = [
    "Gradients",
    "Layout",
    "Measured",
    "Segment",
    "add_update",
    "check_losses",
    "grams",
    "reach",
]

MEMORY = 48 * 2**20
"""Bytes that task gradients may take at once. Where those of all shared layers take more, they are taken in stages; a
single layer is never divided, so tasks x (the largest layer) is needed in any case."""


class Gradients:
    """Measures per-task gradients of one model; keeps its buffer between steps.

    Args:
        model: The network whose layers are measured; split models too.
        shared: Names or globs of the shared layers where the graph cannot tell (compiled regions); None finds them.
        engine: "flat" takes gradients at the weights, "delta" at the output of every layer that allows it, "auto"
            where that clearly pays.
        memory: Bytes that task gradients may take at once, see `MEMORY`.
        alone: This process trains a model of its own, whatever torch.distributed runs beside it.

    Attributes:
        engines: Which engine each measured layer uses and, if it is "flat", why: filled by the first sweep.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shared: Iterable[str] | None = None,
        engine: str = "flat",
        memory: float = MEMORY,
        alone: bool = False,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ProbeError(
                "This model is wrapped in DistributedDataParallel, under which per-task gradients would silently stay "
                "local to each process: use `gradients_of(model)`."
            )
        self._alone = alone
        lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
        if lazy:
            raise ProbeError(f"Parameter {lazy[0]!r} has no shape yet: run the model once on a batch before probing.")
        self.model = model
        self.engine = engine
        self.memory = memory
        self.engines: dict[str, str] = {}
        # `torch.compile` wraps modules: a plan made from the log is to name the layers of the uncompiled network.
        self.layers = [replace(layer, name=_uncompiled(layer.name)) for layer in find_layers(model)]
        self.forced = None if shared is None else set(match_layers(shared, [layer.name for layer in self.layers]))
        self.parameters = dict(model.named_parameters())
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._buffer: Tensor | None = None
        self._trusted: dict[tuple[str, int], bool] = {}  # (weight, tasks) -> whether `delta` agreed with `flat`

    def layout(self, losses: Mapping[str, Tensor]) -> Layout:
        """Find what the given losses share; cached for graphs that share the same."""
        return self._read(losses)[1]

    def _read(self, losses: Mapping[str, Tensor]) -> tuple[Graph, Layout]:
        check_losses(losses)
        graph = Graph(list(losses.values()), opaque=self.forced is not None)
        everyone = (1 << len(losses)) - 1
        masks: dict[str, int] = {}
        for layer in self.layers:
            for name in layer.parameters:
                parameter = self.parameters[name]
                masks[name] = graph.mask(parameter)
                if self.forced is not None and layer.name in self.forced and parameter.requires_grad:
                    masks[name] = everyone
        return graph, self.layout_of(tuple(losses), masks)

    def layout_of(self, tasks: Sequence[str], masks: Mapping[str, int]) -> Layout:
        """Lay out what is shared.

        Args:
            tasks: Their names.
            masks: Parameter name -> bit mask of the positions of the tasks that reach it; cached for equal ones.
        """
        found = {n: masks[n] for layer in self.layers for n in layer.parameters if masks.get(n)}
        kinds = tuple((p.dtype, p.device) for p in self.parameters.values())  # `model.to` may change them
        key = (tuple(tasks), tuple(found.items()), kinds)
        if key not in self._layouts:
            self._layouts[key] = self._build(tuple(tasks), found)
        return self._layouts[key]

    def _build(self, tasks: tuple[str, ...], masks: Mapping[str, int]) -> Layout:
        segments: list[Segment] = []
        shared: list[tuple[str, nn.Parameter]] = []
        starts: list[int] = []
        owner: list[int] = []
        position = 0
        for layer in self.layers:
            names = [n for n in layer.parameters if many(masks.get(n, 0))]
            if not names:
                continue
            start = position
            for n in names:
                shared.append((n, self.parameters[n]))
                starts.append(position)
                owner.append(len(segments))
                position += real_numel(self.parameters[n])
            union = 0
            for n in names:
                union |= masks[n]
            reaching = tuple(i for i in range(len(tasks)) if union >> i & 1)
            segments.append(Segment(layer.name, start, position, reaching))
        every = [p for _, p in shared]
        homes = {p.device: n for n, p in reversed(shared)}
        if len(homes) > 1:
            where = ", ".join(f"{n!r} on {device}" for device, n in homes.items())
            raise ProbeError(
                f"The shared parameters lie on several devices ({where}), so that their gradients form no one vector: "
                "put the shared part on one device."
            )
        dtype = torch.float32
        for p in every:
            dtype = torch.promote_types(dtype, p.dtype.to_real())
        return Layout(
            tasks=tasks,
            segments=tuple(segments),
            shared=tuple(shared),
            starts=tuple(starts),
            owner=tuple(owner),
            reached=tuple(
                frozenset(j for j, (n, _) in enumerate(shared) if masks[n] >> i & 1) for i in range(len(tasks))
            ),
            exclusive=tuple(
                tuple(self.parameters[n] for n, m in masks.items() if m == 1 << i) for i in range(len(tasks))
            ),
            dtype=dtype,
            device=every[0].device if every else torch.device("cpu"),
        )

    def trusted(self) -> list[tuple[str, int, bool]]:
        """For which weight and number of tasks `delta` was compared with `flat`, and whether they agreed."""
        return [(name, tasks, agrees) for (name, tasks), agrees in self._trusted.items()]

    def trust(self, found: Any) -> None:  # noqa: ANN401 from a file
        """Go on with what `trusted` gave: what was compared is not compared again.

        Raises:
            RunError: If it is damaged, or of another network.
        """
        try:
            taken = {(name, int(tasks)): bool(agrees) for name, tasks, agrees in found}
        except (TypeError, ValueError):
            raise RunError("the list of the probe's compared weights is damaged.") from None
        if not taken.keys() <= {(name, tasks) for name in self.parameters for _, tasks in taken}:
            raise RunError("the probe has measured another network.")
        self._trusted.clear()
        self._trusted.update(taken)

    def sweep(
        self,
        losses: Mapping[str, Tensor],
        *,
        retain_graph: bool = False,
        weigh: Callable[[Tensor, Layout], Tensor] | None = None,
    ) -> Measured:
        """Measure every shared layer once.

        Args:
            losses: Scalar loss per task, all from one forward pass.
            retain_graph: Keep the graph for a further backward pass.
            weigh: Turns the Gram matrices [layers, tasks, tasks], and the layout, into the weights [tasks] with which
                the shared gradients are summed; None sums them. The weights depend on every layer: all gradients are
                kept until then if they take at most `passes.KEEP` bytes, else one more backward pass makes the update.

        Returns:
            Grams and update; the caller owns their memory.
        """
        self.refuse_alone()
        graph, layout = self._read(losses)
        self._refuse_hooks(layout)
        sites = self._sites(graph, layout)
        return self._make(graph, layout, losses, sites, retain_graph, self.memory).run(weigh)

    def measure(
        self, losses: Mapping[str, Tensor], *, retain_graph: bool = False
    ) -> tuple[Layout, Tensor, list[list[Tensor | None]]]:
        """Take every task's gradient explicitly, see `explicit`.

        Returns:
            The layout; the shared gradients [tasks, parameters], a buffer that the next call overwrites; and per task
            the gradients of the parameters that it alone reaches.
        """
        found, rows = self.explicit(losses, retain_graph=retain_graph)
        return found.layout, rows, found.own

    def explicit(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> tuple[Measured, Tensor]:
        """Measure every shared layer with every task's gradient at the weights, whatever the engine and the memory.

        Args:
            losses: Scalar loss per task, all from one forward pass.
            retain_graph: Keep the graph for a further backward pass.

        Returns:
            Grams and update, and the shared gradients [tasks, parameters], a buffer that the next call overwrites.
        """
        self.refuse_alone()
        graph, layout = self._read(losses)
        self._refuse_hooks(layout)
        sweep = self._make(graph, layout, losses, {}, retain_graph, float("inf"))
        found = sweep.run(None)
        (part,) = sweep.parts
        return found, part.rows

    def at_features(
        self,
        losses: Mapping[str, Tensor],
        weigh: Callable[[Tensor], Tensor],
        *,
        retain_graph: bool = False,
    ) -> Measured:
        """Weigh tasks by their gradients where the shared part ends: one pass through the shared part, not T.

        Args:
            losses: Scalar loss per task, all from one forward pass.
            weigh: Turns inner products [tasks, tasks] into weights [tasks].
            retain_graph: Keep the graph for a further backward pass.

        Reference: Sener and Koltun, NeurIPS 2018, section 3.3 (MGDA-UB).
        """
        self.refuse_alone()
        graph, layout = self._read(losses)
        self._refuse_hooks(layout)
        return self._make(graph, layout, losses, {}, retain_graph, float("inf")).at_features(weigh)

    def add(self, found: Measured) -> None:
        """Add what a sweep found to `.grad`."""
        add_update(found.layout, found.total, found.own, found.sparse, found.outside, found.missing)

    def average(self) -> None:
        """Average `.grad` over the processes that train the model; there are no others here."""

    def mean_losses(self, losses: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> dict[str, float]:
        """The losses' values; averages, where several processes train the model.

        Args:
            losses: Scalar loss per task.
            scale: What they were multiplied by.
        """
        values = torch.stack([v.detach().double() for v in losses.values()]) / scale
        return dict(zip(losses, values.tolist(), strict=True))

    def same_everywhere(self, vector: Tensor) -> Tensor:
        """What the first process has made, in which random numbers were drawn; there are no others here."""
        return vector

    def backward(self, losses: Mapping[str, Tensor], *, last: bool = True) -> None:
        """Run one ordinary backward pass over the summed losses.

        Args:
            losses: Scalar loss per task.
            last: Whether a step ends with it; gradients are averaged over processes then.
        """
        del last
        self.refuse_alone()
        check_losses(losses)
        total = sum(losses.values())
        assert isinstance(total, Tensor)  # check_losses has seen at least one tensor
        total.backward()

    def reference(self, losses: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """Compute the Gram matrices of a layout's layers slowly, [layers, tasks, tasks]; the graph is kept."""
        return reference_grams(losses, dict(zip(layout.layers, of_layers(layout), strict=True)))

    def reference_update(self, losses: Mapping[str, Tensor], layout: Layout) -> list[Tensor]:
        """The gradient of the summed losses of each layer of a layout, [elements] in float64; the graph is kept."""
        return reference_vectors(sum(losses.values(), torch.zeros(())), of_layers(layout))

    def refuse_alone(self) -> None:
        """Raise a ProbeError if other processes train the same model as far as anybody can tell."""
        if not self._alone:
            refuse_alone()

    def _make(
        self,
        graph: Graph,
        layout: Layout,
        losses: Mapping[str, Tensor],
        sites: Mapping[int, Site],
        retain: bool,
        memory: float,
    ) -> Sweep:
        return Sweep(
            graph,
            layout,
            list(losses.values()),
            sites=sites,
            trusted=self._trusted,
            space=lambda floats: self._space(layout, floats),
            settle=buffers_once(self.model),
            memory=memory,
            whole=self.forced is not None,
            retain=retain,
            outside=self._outside(graph),
        )

    def _outside(self, graph: Graph) -> list[Tensor]:
        """Leaves that are no parameters of the model; `.grad` gets theirs too, but they are not measured."""
        mine = {id(p) for p in self.parameters.values()}
        found = [node.variable for leaf, node in graph.leaves.items() if leaf not in mine]  # type: ignore[attr-defined]
        if found:
            now = {id(p): n for n, p in self.model.named_parameters()}
            new = [now[id(leaf)] for leaf in found if id(leaf) in now]
            if new:
                raise ProbeError(
                    f"Parameter {new[0]!r} came into the model after the probe was made, which does not measure it: "
                    "make a new `Probe(model)` once the model is complete."
                )
        self._refuse_late_hooks((f"A tensor of shape {list(p.shape)} outside the model", p) for p in found)
        return found

    def _space(self, layout: Layout, floats: int) -> Tensor:
        buffer = self._buffer
        if buffer is None or buffer.numel() < floats or buffer.dtype != layout.dtype or buffer.device != layout.device:
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = buffer = torch.empty(floats, dtype=layout.dtype, device=layout.device)
        return buffer[:floats]

    def _sites(self, graph: Graph, layout: Layout) -> dict[int, Site]:
        """Choose the weights, by position, that are measured at their layer's output; notes the choice per layer."""
        chosen: dict[int, Site] = {}
        tasks, itemsize = len(layout.tasks), layout.dtype.itemsize
        for k, segment in enumerate(layout.segments):
            indices = [j for j, owner in enumerate(layout.owner) if owner == k]
            own = {id(layout.shared[j][1]) for j in indices}
            why = ""
            for j in indices:
                name, parameter = layout.shared[j]
                if self.engine == "flat" or self.forced is not None:
                    reason: str | None = "as asked for" if self.forced is None else "the graph is hidden"
                elif parameter.ndim < 2:
                    reason = "no matrix of weights"
                else:
                    found = find_site(graph, parameter, own)
                    reason = found if isinstance(found, str) else None
                    if isinstance(found, Site):
                        floats = site_floats(found.shape, tasks)
                        if parameter.dtype != layout.dtype:
                            reason = f"its weight is {parameter.dtype}"
                        elif not self._trusted.get((name, tasks), True):
                            reason = "delta differed from flat"
                        elif self.engine == "auto" and not pays(found.shape, tasks):
                            reason = "delta would not pay"
                        elif floats * itemsize > max(self.memory, 2 * tasks * parameter.numel() * itemsize):
                            reason = "delta would need more memory"
                        else:
                            chosen[j] = found
                why = why or reason or ""
            self.engines[segment.layer] = "delta" if chosen.keys() & set(indices) else f"flat ({why})"
        return chosen

    def _refuse_hooks(self, layout: Layout) -> None:
        names = {id(p): n for n, p in self.parameters.items()}
        self._refuse_late_hooks((f"Parameter {names[id(p)]!r}", p) for ps in layout.exclusive for p in ps)
        hooked = [n for n, p in layout.shared if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)]
        if hooked:
            raise ProbeError(
                f"Parameter {hooked[0]!r} has a gradient hook, which would see every task's gradient, not their sum. "
                "Remove it while probing, or act on `.grad` after `probe.backward`."
            )

    @staticmethod
    def _refuse_late_hooks(leaves: Iterable[tuple[str, Tensor]]) -> None:
        for what, leaf in leaves:
            if getattr(leaf, "_post_accumulate_grad_hooks", None):
                raise ProbeError(
                    f"{what} has a hook that runs after its gradient was accumulated (an optimizer step, say), which a "
                    "measured step would not call. Remove it while probing, or act after `probe.backward`."
                )


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod") or ROOT


def of_layers(layout: Layout) -> list[list[nn.Parameter]]:
    """The shared parameters of each measured layer."""
    out: list[list[nn.Parameter]] = [[] for _ in layout.segments]
    for (_, parameter), k in zip(layout.shared, layout.owner, strict=True):
        out[k].append(parameter)
    return out


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
    with full_precision(rows.device):
        for k, segment in enumerate(layout.segments):
            part = rows[:, segment.start : segment.stop]
            torch.mm(part, part.T, out=out[k])
    mark_absent(layout, out)
    return out


def add_update(
    layout: Layout,
    total: Tensor,
    own: Sequence[Sequence[Tensor | None]],
    sparse: Mapping[int, Tensor] | None = None,
    outside: Sequence[tuple[Tensor, Tensor]] = (),
    missing: AbstractSet[int] = frozenset(),
) -> None:
    """Add an update to `.grad`, as the backward pass of the summed losses would.

    Args:
        layout: Where the shared parameters lie in the update.
        total: The update of the shared parameters, [parameters].
        own: Per task the gradients of the parameters that it alone reaches.
        sparse: Shared parameters, by position, whose `.grad` is to be sparse, with its rows [n].
        outside: Further leaves, each with its gradient.
        missing: Shared parameters, by position, whose `.grad` stays as it is: an optimizer tells None from zero.
    """
    seen: set[int] = set()
    others = ([p for p, _ in outside], [g for _, g in outside])
    for parameters, grads in [*zip(layout.exclusive, own, strict=True), others]:
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is None:
                continue
            # autograd may hand out one tensor for two parameters, or an expanded one: `.grad` must own its memory
            alias = not grad.is_sparse and (not grad.is_contiguous() or grad.data_ptr() in seen)
            _add_grad(parameter, grad.contiguous().clone() if alias else grad)
            if not grad.is_sparse:
                seen.add(grad.data_ptr())
    for j, (_, parameter) in enumerate(layout.shared):
        if j in missing:
            continue
        _add_grad(parameter, as_gradient(total[layout.at(j)], parameter, None if sparse is None else sparse.get(j)))


def as_gradient(flat: Tensor, parameter: nn.Parameter, rows: Tensor | None) -> Tensor:
    """Give real numbers [elements] the shape and the type of a parameter; sparse, if its rows [n] are given."""
    if parameter.is_complex():
        return torch.view_as_complex(flat.view(*parameter.shape, 2)).to(parameter.dtype)
    grad = flat.view(parameter.shape).to(parameter.dtype)
    if rows is None:
        return grad
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=False).coalesce()


def _add_grad(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    elif parameter.grad.is_sparse and not grad.is_sparse:
        parameter.grad = grad + parameter.grad
    else:
        parameter.grad += grad
