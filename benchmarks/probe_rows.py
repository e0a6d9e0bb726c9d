"""One training step, measured in each of the ways that `probe.py` compares.

`joint` is one backward pass of the summed loss; `plain` is T backward passes, one per task, with gradients dropped.
`flat` and `auto` are the probe's engines, update included. Per-layer Gram matrices and an update come out of every row
below `plain_gemm` too, so that all of them give the same:

- `plain_gemm`: `plain`, but the layers that `auto` measures at their output take their weight gradients by a matrix
  product whose unfolded input all tasks share. The fair comparison of kernels: what `auto` gains over this row is the
  algorithm, the rest of its gain over `plain` a plain training could have too.
- `torchjd`, `torchjd_vmap`: TorchJD's `mtl_backward`, task by task or all at once; Grams from `.jac`.
- `libmtl`: restates how LibMTL takes gradients: T backward passes through everything, copied into one [T, P].
- `published`: restates, from the paper and its appendix, how its Grams were computed: a loop over tasks, layers and
  pairs, `normalize` and one dot product per pair. It is no measurement of anybody's released code.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Workload

import reconmtl as rm
from reconmtl.engines import product
from reconmtl.gram import Gradients, add_update

CORE = ("joint", "plain", "flat", "auto", "plain_gemm")
ROWS = (*CORE, "torchjd", "torchjd_vmap", "libmtl", "published")


class Steps:
    """One step of each row on one network."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model, self.x = workload.make().to(device), workload.inputs().to(device)
        self.gradients = {name: Gradients(self.model, engine=name) for name in ("flat", "auto")}
        self.layers = [m for m in self.model.trunk.modules() if any(True for _ in m.parameters(recurse=False))]
        self.by_layer = [list(m.parameters(recurse=False)) for m in self.layers]
        self.by_product: nn.Module | None = None

    def forward(self, model: Any = None) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ANN401 a Headed
        model = self.model if model is None else model
        model.zero_grad()
        features = model.trunk(self.x)
        return features, model.losses(features)

    def joint(self) -> None:
        torch.stack(list(self.forward()[1].values())).sum().backward()

    def plain(self) -> None:
        self._plain(self.model)

    def _plain(self, model: nn.Module) -> None:
        losses, parameters = self.forward(model)[1], list(model.parameters())
        for i, loss in enumerate(losses.values()):
            torch.autograd.grad(loss, parameters, retain_graph=i < len(losses) - 1, allow_unused=True)

    def _sweep(self, engine: str) -> None:
        found = self.gradients[engine].sweep(self.forward()[1])
        add_update(found.layout, found.total, found.own)

    def flat(self) -> None:
        self._sweep("flat")

    def auto(self) -> None:
        self._sweep("auto")

    def probe(self, probe: rm.Probe) -> None:
        probe.backward(self.forward()[1])

    def plain_gemm(self) -> None:
        if self.by_product is None:
            engines = self.gradients["auto"].engines
            assert engines  # `auto` has run
            self.by_product = copy.deepcopy(self.model)
            for name, module in self.by_product.named_modules():
                if engines.get(name) == "delta":
                    module.forward = _Product(module)
        self._plain(self.by_product)

    def torchjd(self) -> None:
        self._torchjd(1)

    def torchjd_vmap(self) -> None:
        self._torchjd(None)

    def _torchjd(self, chunk: int | None) -> None:
        from torchjd.autojac import mtl_backward

        features, losses = self.forward()
        mtl_backward(list(losses.values()), features=features, parallel_chunk_size=chunk)
        for own in self.by_layer:
            gram = self.x.new_zeros(len(losses), len(losses))
            for p in own:
                rows = p.jac.flatten(1)
                gram += rows @ rows.T
                p.grad = p.jac.sum(0)
                del p.jac

    def libmtl(self) -> None:
        losses = self.forward()[1]
        shared = [p for own in self.by_layer for p in own]
        rows = self.x.new_zeros(len(losses), sum(p.numel() for p in shared))
        for i, loss in enumerate(losses.values()):
            loss.backward(retain_graph=i < len(losses) - 1)
            start = 0
            for p in shared:
                assert p.grad is not None
                rows[i, start : start + p.numel()] = p.grad.view(-1)
                p.grad.zero_()
                start += p.numel()
        self._spread(sum(rows[i] for i in range(len(losses))))
        start = 0
        for own in self.by_layer:
            part = rows[:, start : (start := start + sum(p.numel() for p in own))]
            part @ part.T

    def published(self) -> None:
        losses = self.forward()[1]
        vectors: list[list[Tensor]] = []
        rows = self.x.new_zeros(sum(p.numel() for own in self.by_layer for p in own), len(losses))
        for i, loss in enumerate(losses.values()):
            loss.backward(retain_graph=True)
            vectors.append([torch.cat([p.grad.flatten() for p in own]) for own in self.by_layer])
            rows[:, i] = torch.cat(vectors[-1])
            for own in self.by_layer:
                for p in own:
                    p.grad = None
        for k in range(len(self.by_layer)):
            for i in range(len(losses)):
                for j in range(i + 1, len(losses)):
                    (F.normalize(vectors[i][k], dim=0) * F.normalize(vectors[j][k], dim=0)).sum()
        self._spread(rows.mean(1) * len(losses))

    def _spread(self, update: Tensor) -> None:
        """One vector of all shared gradients to each parameter's `.grad`."""
        start = 0
        for own in self.by_layer:
            for p in own:
                p.grad = update[start : start + p.numel()].view(p.shape).clone()
                start += p.numel()


class _Product:
    """A layer's forward whose weight gradient is one matrix product; keeps the unfolded input between the passes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        m = self.module
        geometry = (m.stride, m.padding) if isinstance(m, nn.Conv2d) else None
        out: Tensor = _ByProduct.apply(x, m.weight, m.bias, geometry)
        return out


class _ByProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.rows = geometry, None
        return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3]]
        if ctx.geometry is None:
            bias = grad.flatten(0, -2).sum(0) if needs[2] else None
            into = product(grad.flatten(0, -2).T, x.flatten(0, -2).T)
            return grad @ weight if needs[0] else None, into, bias, None
        stride, padding = ctx.geometry
        if ctx.rows is None:
            ctx.rows = _windows(x, weight.shape[2:], stride, padding, grad.shape[2:])
        rest = torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], 1, [needs[0], False, needs[2]]
        )
        into = product(grad.permute(1, 2, 3, 0).flatten(1), ctx.rows).view(weight.shape)
        return rest[0], into, rest[2], None


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, out: Any) -> Tensor:  # noqa: ANN401 pairs
    """[channels x taps, positions], samples innermost: long contiguous runs."""
    padded = F.pad(x.permute(1, 2, 3, 0), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    at = padded.stride()
    size = (len(padded), *kernel, *out, len(x))
    return padded.as_strided(size, (at[0], at[1], at[2], at[1] * stride[0], at[2] * stride[1], 1)).reshape(
        size[0] * size[1] * size[2], -1
    )
