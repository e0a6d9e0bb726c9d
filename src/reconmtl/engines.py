"""Per-layer Gram matrices from the gradient at a layer's output, without forming the gradient of its weight.

For a convolution or linear map with unfolded input U [fan-in, N] (N = batch x positions) and the gradient D_i
[outputs, N] of task i at its output, task i's weight gradient is D_i U^T. Hence <D_i U^T, D_j U^T> = <D_i K, D_j> with
K = U^T U [N, N], the same for all tasks, and any weighted sum of the tasks' gradients is one product
(sum_i w_i D_i) U^T. With few positions that is far less than one weight gradient per task: late convolutions, linear
layers on vectors.

Input and geometry are read from what autograd itself saved for the layer's backward node. That needs nothing at forward
time, and every guard follows from the graph: the weight must be a leaf that this one node uses; a saved input that was
changed in place raises autograd's own error; values that saved-tensor hooks have packed (activation checkpointing,
offloading) are left alone. A layer that does not qualify is measured by `flat`, and `Probe.engines` says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from reconmtl.graph import Graph

MARGIN = 0.8
"""`auto` takes `delta` for a layer if its estimated cost is below this share of `flat`'s."""

MOVE = 20
"""What moving one float through memory costs, in multiply-adds."""

REORDER = 9
"""How often convolution kernels move each weight when they write the gradient: they accumulate it in a layout of their
own. That is why weight gradients on maps of a few pixels run far below peak."""

CALLS = 10**7
"""What the dozen small operations of `delta` cost however small the layer is, in multiply-adds."""


class Shape(NamedTuple):
    """What the cost of measuring a layer depends on.

    Attributes:
        positions: N, batch times output positions.
        fan_in: Columns of the weight, flattened.
        outputs: Rows of the weight.
        pixels: Batch times input positions, for a convolution with a kernel of more than one tap; else 0.
        taps: Extent of the kernel.
    """

    positions: int
    fan_in: int
    outputs: int
    pixels: int = 0
    taps: int = 1

    @property
    def by_pixels(self) -> bool:
        """Whether K is cheaper from the inner products of pixels than from those of unfolded windows."""
        n, fan_in = self.positions, self.fan_in
        shifted = self.pixels**2 * (fan_in // self.taps) + MOVE * n * n * (self.taps + 1)
        return self.pixels > 0 and shifted < n * n * fan_in + 2 * MOVE * n * fan_in


@dataclass(frozen=True)
class Site:
    """A layer's backward node from which the Gram of its weight (and bias) follows.

    Attributes:
        node: The node; its first input is the gradient at the layer's output.
        weight: `id` of the weight's leaf.
        bias: `id` of the bias's leaf, if the node adds one that is a leaf used here only.
        shape: Of the layer and its input.
        kernel: Extent of a convolution's kernel.
    """

    node: Node
    weight: int
    bias: int | None
    shape: Shape
    kernel: tuple[int, ...]

    def saved(self) -> Tensor:
        """The layer's input, as autograd saved it; to be held before the pass that frees it.

        Raises:
            RuntimeError: Autograd's own, if the input was changed in place or the graph was freed.
        """
        return _saved(self.node).detach()

    def input_gram(self, saved: Tensor) -> Tensor:
        """Inner products K of what the positions of the output see of the input.

        A window's inner product with another is the sum, over the taps of the kernel, of inner products of pixels. The
        latter are computed once instead of once per tap, which costs taps times less than unfolding where the stride is
        one, and needs no memory for windows.

        Args:
            saved: The layer's input.

        Returns:
            [N, N], in the column order of `store`.
        """
        if not self._convolves:
            return product(saved, saved)
        x, window = self._planar(saved)
        out_h, out_w = window.sizes
        batch, channels, height, width = x.shape
        if not self.shape.by_pixels:
            rows = self._windows(x, window).flatten(0, 2).T
            kernel = product(rows, rows)
        else:
            # Pixel by pixel, samples innermost: a shift by one tap then moves long contiguous runs.
            pixels = x.permute(2, 3, 0, 1).reshape(-1, channels)
            inner = product(pixels, pixels).view(height, width, batch, height, width, batch)
            kernel = x.new_zeros(out_h, out_w, batch, out_h, out_w, batch)
            for tap in range(self.shape.taps):
                (to_h, from_h), (to_w, from_w) = window.shift(tap, (height, width))
                kernel[to_h, to_w, :, to_h, to_w] += inner[from_h, from_w, :, from_h, from_w]
        size = (out_h, out_w, batch)
        return kernel.view(*size, *size).permute(2, 0, 1, 5, 3, 4).reshape(self.shape.positions, -1)

    def weight_gradient(self, saved: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the weight, from one at the output.

        Args:
            saved: The layer's input.
            grad: [outputs, N], in the column order of `store`.

        Returns:
            [outputs, fan-in].
        """
        if not self._convolves:
            return product(grad, saved.T)
        x, window = self._planar(saved)
        rows = grad.view(-1, len(x), *window.sizes).permute(0, 2, 3, 1).flatten(1)
        return product(rows, self._windows(x, window).view(self.shape.fan_in, -1))

    @property
    def _convolves(self) -> bool:
        return self.node.name() == "ConvolutionBackward0"

    def _planar(self, saved: Tensor) -> tuple[Tensor, _Window]:
        """Input [B, channels, height, width] and how the kernel moves over it; a signal is an image of height one."""
        kernel, (stride, padding, dilation) = list(self.kernel), _geometry(self.node)
        if saved.ndim == 3:
            saved, kernel = saved.unsqueeze(2), [1, *kernel]
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        sizes = [_extent(*e) for e in zip(saved.shape[2:], kernel, stride, padding, dilation, strict=True)]
        return saved, _Window(kernel, stride, padding, dilation, sizes)

    def _windows(self, x: Tensor, window: _Window) -> Tensor:
        """Every window of the input, [channels, kernel height, kernel width, N]; samples innermost within N."""
        batch, channels, height, width = x.shape
        (top, left), (out_h, out_w) = window.padding, window.sizes
        padded = x.new_zeros(channels, height + 2 * top, width + 2 * left, batch)
        padded[:, top : top + height, left : left + width].copy_(x.permute(1, 2, 3, 0))
        at, (down, right), (apart_h, apart_w) = padded.stride(), window.stride, window.dilation
        views = padded.as_strided(
            (channels, *window.kernel, out_h, out_w, batch),
            (at[0], at[1] * apart_h, at[2] * apart_w, at[1] * down, at[2] * right, 1),
        )
        return views.reshape(channels, *window.kernel, -1)

    def store(self, grad: Tensor, into: Tensor) -> None:
        """Write a gradient at the layer's output into [outputs, N], in the column order of `unfolded`."""
        if grad.ndim == 2:
            into.copy_(grad.T)
        else:
            rows = grad.transpose(0, 1)
            into.view(rows.shape).copy_(rows)


@dataclass(frozen=True)
class _Window:
    """How a kernel moves over an image: everything [height, width]."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    sizes: Sequence[int]  # of the output

    def shift(self, tap: int, image: Sequence[int]) -> list[tuple[slice, slice]]:
        """Which output positions a tap serves, and from which input positions; [height, width]."""
        out = []
        for k, at in enumerate(divmod(tap, self.kernel[1])):
            offset, step = at * self.dilation[k] - self.padding[k], self.stride[k]
            first = max(0, -(offset // step))
            last = max(first, min(self.sizes[k], (image[k] - 1 - offset) // step + 1))
            begin = first * step + offset
            out.append((slice(first, last), slice(begin, begin + (last - first) * step, step)))
        return out


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
        place, taps = 2, math.prod(weight.shape[2:])
        pixels = x.shape[0] * math.prod(x.shape[2:]) if taps > 1 else 0
    else:
        positions, pixels, taps = x.shape[0], 0, 1
        place = 0 if kind == "AddmmBackward0" else -1
    if x.dtype != weight.dtype or x.layout != torch.strided or x.is_complex():
        return f"its input is {x.dtype}, {x.layout}"
    bias = None
    for child, _, at in graph.children[node]:
        leaf = getattr(child, "variable", None)
        if at == place and leaf is not None and id(leaf) in own and leaf.ndim == 1 and len(graph.uses[child]) == 1:
            bias = id(leaf) if leaf.numel() == weight.shape[0] and leaf.dtype == weight.dtype else None
    shape = Shape(positions, weight[0].numel(), weight.shape[0], pixels, taps)
    return Site(node, id(weight), bias, shape, tuple(weight.shape[2:]))


def _saved(node: Node) -> Tensor:
    names = {"ConvolutionBackward0": "_saved_input", "AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
    x: Tensor = getattr(node, names[node.name()])
    return x


def _geometry(node: Node) -> tuple[list[int], list[int], list[int]]:
    return list(node._saved_stride), list(node._saved_padding), list(node._saved_dilation)  # type: ignore[attr-defined]


def _extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def site_floats(shape: Shape, tasks: int) -> int:
    """Floats that a site needs at once: gradients at its output, products with K; K itself, or the unfolded input."""
    n = shape.positions
    squares = 2 * n * n + (shape.pixels**2 if shape.by_pixels else n * shape.fan_in)
    return 2 * tasks * shape.outputs * n + max(squares, 2 * n * shape.fan_in)


def pays(shape: Shape, tasks: int) -> bool:
    """Whether `delta` costs clearly less time than `flat` for a layer.

    A rule on shapes and not a measurement, so that a seed gives the same bits on every run and machine. Its constants
    are fitted to layers of convolutional networks and perceptrons, measured on one core.

    Args:
        shape: Of the layer and its input.
        tasks: Number of tasks.
    """
    n, fan_in, outputs, pixels, taps = shape
    weights = fan_in * outputs
    # one gradient per task, one inner product per pair; copied, read, summed
    flat = tasks * weights * (n + tasks + (REORDER + 4) * MOVE)
    # K, one product per task, one inner product per pair, the update
    if shape.by_pixels:
        delta = pixels**2 * (fan_in // taps) + MOVE * n * n * (taps + 1)
    else:
        delta = n * n * fan_in + 2 * MOVE * n * fan_in
    delta += tasks * n * n * outputs + tasks**2 * n * outputs + n * weights
    delta += MOVE * (2 * n * fan_in + 3 * weights + 4 * tasks * n * outputs) + CALLS
    return delta < MARGIN * flat


def site_gram(kernel: Tensor, grads: Tensor, *, bias: bool) -> Tensor:
    """Compute the Gram matrix of the tasks' weight gradients (and bias gradients) at one layer.

    Args:
        kernel: Inner products K of the layer's inputs, [N, N]; overwritten.
        grads: Gradients at its output, [tasks, outputs, N].
        bias: Whether the bias belongs to it.

    Returns:
        Inner products [tasks, tasks].
    """
    if bias:
        kernel += 1  # the bias is the weight of an input that is always one
    tasks = grads.shape[0]
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
