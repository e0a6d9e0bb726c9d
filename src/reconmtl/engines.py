"""Per-layer Gram matrices from the gradient at a layer's output, without forming the gradient of its weight.

For a convolution or linear map with unfolded input U [fan-in, N] (N = batch x positions) and the gradient D_i
[outputs, N] of task i at its output, task i's weight gradient is D_i U^T. Hence <D_i U^T, D_j U^T> = <D_i K, D_j> with
K = U^T U [N, N], the same for all tasks, and any weighted sum of the tasks' gradients is one product
(sum_i w_i D_i) U^T. With few positions and many tasks that is far less than one weight gradient per task: late
convolutions, linear layers on vectors.

Input and geometry are read from what autograd itself saved for the layer's backward node. That needs nothing at forward
time, and every guard follows from the graph: the weight must be a leaf that this one node uses; a saved input that was
changed in place raises autograd's own error; values that saved-tensor hooks have packed (activation checkpointing,
offloading) are left alone. A layer that does not qualify is measured by `flat`, and `explain` says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from reconmtl.graph import Graph

MARGIN = 0.7
"""`auto` takes `delta` for a layer if its estimated cost is below this share of `flat`'s."""

MOVE = 20
"""What moving one float through memory costs, in multiply-adds."""


@dataclass(frozen=True)
class Site:
    """A layer's backward node from which the Gram of its weight (and bias) follows.

    Attributes:
        node: The node; its first input is the gradient at the layer's output.
        weight: `id` of the weight's leaf.
        bias: `id` of the bias's leaf, if the node adds one that is a leaf used here only.
        outputs: Rows of the weight.
        fan_in: Columns of the weight, flattened.
        positions: N, batch times output positions.
        kernel: Extent of a convolution's kernel.
    """

    node: Node
    weight: int
    bias: int | None
    outputs: int
    fan_in: int
    positions: int
    kernel: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Positions, fan-in and outputs: what the choice of an engine depends on."""
        return self.positions, self.fan_in, self.outputs

    def saved(self) -> Tensor:
        """The layer's input, as autograd saved it; to be held before the pass that frees it.

        Raises:
            RuntimeError: Autograd's own, if the input was changed in place or the graph was freed.
        """
        return _saved(self.node).detach()

    def unfolded(self, saved: Tensor) -> Tensor:
        """The layer's input with one row per weight column, [fan-in, N]."""
        if self.node.name() != "ConvolutionBackward0":
            return saved.T
        x, kernel = saved, list(self.kernel)
        stride, padding, dilation = _geometry(self.node)
        if x.ndim == 3:
            x, kernel = x.unsqueeze(2), [1, *kernel]
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        if any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        batch, channels = x.shape[:2]
        size = [_extent(x.shape[2 + k], kernel[k], stride[k], 0, dilation[k]) for k in (0, 1)]
        step = x.stride()
        windows = x.as_strided(
            (channels, *kernel, batch, *size),
            (step[1], step[2] * dilation[0], step[3] * dilation[1], step[0], step[2] * stride[0], step[3] * stride[1]),
            x.storage_offset(),
        )
        return windows.reshape(self.fan_in, self.positions)

    def store(self, grad: Tensor, into: Tensor) -> None:
        """Write a gradient at the layer's output into [outputs, N], in the column order of `unfolded`."""
        if grad.ndim == 2:
            into.copy_(grad.T)
        else:
            rows = grad.transpose(0, 1)
            into.view(rows.shape).copy_(rows)


def find_site(graph: Graph, weight: Tensor, own: AbstractSet[int]) -> Site | str:
    """Find the one node that uses a weight, if the weight's Gram can be computed there.

    Args:
        graph: Of the losses.
        weight: A leaf.
        own: `id` of the parameters of the same layer; a bias must be among them.

    Returns:
        The site, or why there is none.
    """
    uses = graph.uses[graph.leaves[id(weight)]]
    if len(uses) != 1:
        return f"used {len(uses)} times"
    node, argument = uses[0]
    kind = node.name()
    if kind == "TBackward0":
        if len(graph.uses[node]) != 1:
            return f"used {len(graph.uses[node])} times"
        (node, argument) = graph.uses[node][0]
        kind = node.name()
        if (kind, argument) not in {("AddmmBackward0", 2), ("MmBackward0", 1)}:
            return f"used through {kind}"
        if kind == "AddmmBackward0" and (node._saved_alpha != 1 or node._saved_beta != 1):  # type: ignore[attr-defined]
            return "a scaled product"
        raw = node._raw_saved_mat1 if kind == "AddmmBackward0" else node._raw_saved_self  # type: ignore[attr-defined]
    elif (kind, argument) == ("ConvolutionBackward0", 1):
        if node._saved_groups != 1:  # type: ignore[attr-defined]
            return "groups"
        if node._saved_transposed or weight.ndim > 4:  # type: ignore[attr-defined]
            return "transposed or volumetric convolution"
        raw = node._raw_saved_input  # type: ignore[attr-defined]
    else:
        return f"used through {kind}"
    # `unpack_hook` is None without hooks. Where a release of torch does not tell, unpacking might recompute a forward.
    if getattr(raw, "unpack_hook", "unknown") is not None:
        return "its input is packed by saved-tensor hooks, as by activation checkpointing"
    x = _saved(node)
    if kind == "ConvolutionBackward0":
        sizes = [
            _extent(n, k, s, p, d)
            for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *_geometry(node), strict=True)
        ]
        positions = x.shape[0] * math.prod(sizes)
        place = 2
    else:
        positions = x.shape[0]
        place = 0 if kind == "AddmmBackward0" else -1
    if x.dtype != weight.dtype or x.layout != torch.strided or x.is_complex():
        return f"its input is {x.dtype}, {x.layout}"
    bias = None
    for child, _, at in graph.children[node]:
        leaf = getattr(child, "variable", None)
        if at == place and leaf is not None and id(leaf) in own and leaf.ndim == 1 and len(graph.uses[child]) == 1:
            bias = id(leaf) if leaf.numel() == weight.shape[0] and leaf.dtype == weight.dtype else None
    return Site(node, id(weight), bias, weight.shape[0], weight[0].numel(), positions, tuple(weight.shape[2:]))


def _saved(node: Node) -> Tensor:
    names = {"ConvolutionBackward0": "_saved_input", "AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
    x: Tensor = getattr(node, names[node.name()])
    return x


def _geometry(node: Node) -> tuple[list[int], list[int], list[int]]:
    return list(node._saved_stride), list(node._saved_padding), list(node._saved_dilation)  # type: ignore[attr-defined]


def _extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def site_floats(shape: tuple[int, int, int], tasks: int) -> int:
    """Floats that a site needs at once beyond the gradients at its output: its unfolded input, K and one product."""
    n, fan_in, outputs = shape
    return n * fan_in + n * n + tasks * outputs * n


def pays(shape: tuple[int, int, int], tasks: int) -> bool:
    """Whether `delta` costs clearly less than `flat` for a layer, in time and in memory.

    A rule on shapes and not a measurement, so that a seed gives the same bits on every run and machine.

    Args:
        shape: Positions, fan-in and outputs.
        tasks: Number of tasks.
    """
    n, fan_in, outputs = shape
    weights = fan_in * outputs
    flat = tasks * n * weights + tasks**2 * weights + 4 * MOVE * tasks * weights
    # K, one product per task, one inner product per pair, the update
    delta = n * n * fan_in + tasks * n * n * outputs + tasks**2 * n * outputs + n * weights
    delta += MOVE * (2 * n * fan_in + 4 * tasks * n * outputs)
    return delta < MARGIN * flat and tasks * n * outputs + site_floats(shape, tasks) < 2 * tasks * weights


def site_gram(unfolded: Tensor, grads: Tensor, *, bias: bool) -> Tensor:
    """Compute the Gram matrix of the tasks' weight gradients (and bias gradients) at one layer.

    Args:
        unfolded: The layer's input, [fan-in, N].
        grads: Gradients at its output, [tasks, outputs, N].
        bias: Whether the bias belongs to it.

    Returns:
        Inner products [tasks, tasks].
    """
    tasks = grads.shape[0]
    with full_precision(unfolded.device):
        rows = unfolded.T
        kernel = product(rows, rows)
        if bias:
            kernel += 1  # the bias is the weight of an input that is always one
        return grads.flatten(1) @ product(grads.flatten(0, 1), kernel).view(tasks, -1).T  # K is symmetric


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b^T of [m, k] and [n, k], on the CPU by the library that also computes convolutions.

    PyTorch's own matrix product on the CPU is MKL's, which runs at half the rate on processors of other makers.
    """
    large = a.shape[0] * a.shape[1] * b.shape[0] > 10**7  # below, the copies cost more than they gain
    if large and a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        first = a.to_mkldnn()
        return F.linear(first, first if b is a else b.to_mkldnn()).to_dense()
    return a @ b.T


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """TF32 would round inner products to ten bits; switch it off here, whatever the user set for training."""
    if device.type != "cuda":
        yield
        return
    # The setting by backend, not `allow_tf32`: that one raises where a user has set precision the new way.
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def rounds_to_tf32() -> bool:
    """Whether training's own gradients are rounded to ten bits on an accelerator."""
    convolution: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # missing from the stubs
    return "tf32" in (torch.backends.cuda.matmul.fp32_precision, convolution)
