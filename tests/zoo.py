"""Awkward networks: each does something that splitting layers could get wrong. Inputs are seeded."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from reconmtl.layers import find_layers
from reconmtl.networks import mobilenet_raspp, mtan, resnet, segnet
from reconmtl.splitting.structure import transform

TASKS = ("a", "b", "c")
Make = Callable[[Sequence[str]], nn.Module]


@dataclass(frozen=True)
class Net:
    """A network of the zoo.

    Attributes:
        make: Builds it; its argument names the outputs.
        inputs: Builds the positional arguments that it is called with.
        keywords: Builds the keyword arguments.
        single: Layers that matter to one output only, and so cannot be split.
        together: Layers that can only be split together (tied).
        atomic: Modules that have to run whole.
        random: Its forward draws random numbers in these modes, even without dropout.
    """

    make: Make
    inputs: Callable[[], tuple[Any, ...]]
    keywords: Callable[[], dict[str, Any]] = dict
    single: tuple[str, ...] = ("heads.*",)
    together: tuple[str, ...] = ()
    atomic: tuple[str, ...] = ()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(7))


def images(channels: int = 2, size: int = 8, batch: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (noise(batch, channels, size, size),)


def vectors(width: int = 6, batch: int = 4) -> Callable[[], tuple[Any, ...]]:
    return lambda: (noise(batch, width),)


def sequences(width: int = 8, length: int = 5, batch: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (noise(batch, length, width),)


def linear_heads(width: int, tasks: Sequence[str], out: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict({t: nn.Linear(width, out) for t in tasks})


class Headed(nn.Module):
    """A trunk and a linear head per task on its flattened features."""

    def __init__(self, trunk: nn.Module, width: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = linear_heads(width, tasks)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        features = self.trunk(*args, **kwargs).flatten(1)
        return {t: h(features) for t, h in self.heads.items()}


def headed(trunk: Callable[[], nn.Module], width: int) -> Make:
    return lambda tasks: Headed(trunk(), width, tasks)


# Convolutions: skips, cats, in-place operations ---------------------------------------------------------------------


class Block(nn.Module):
    """ResNet's basic block, with every in-place operation that it is usually written with."""

    def __init__(self, inputs: int, outputs: int, *, swap: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs
        self.down = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        self.swap = swap

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = self.down(x)
        if self.swap:  # `shared += branched` where `out += identity` is `branched += shared`, and the other way round
            identity = identity + 0
            identity += out
            return cast(Tensor, self.relu(identity))
        out += identity
        return cast(Tensor, self.relu(out))


def residual(tasks: Sequence[str]) -> nn.Module:
    return Headed(nn.Sequential(Block(2, 4), Block(4, 4), nn.AdaptiveAvgPool2d(1)), 4, tasks)


def residual_swapped(tasks: Sequence[str]) -> nn.Module:
    return Headed(nn.Sequential(Block(2, 4, swap=True), Block(4, 4, swap=True), nn.AdaptiveAvgPool2d(1)), 4, tasks)


class Concat(nn.Module):
    """Dense connections: cat of shared and branched values as list and as tuple, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        self.c3, self.up = nn.Conv2d(8, 4, 1, stride=2), nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, F.relu(self.c1(x))], 1)
        z = torch.cat((y, F.relu_(self.c2(y))), dim=1)
        return torch.stack([self.drop(self.up(self.c3(z))), x], dim=0).mean(0)


class Slices(nn.Module):
    """Written into piece by piece, through slices, masks and views."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(x)
        z = self.c2(y)
        out = z.clone()
        out[:, :2] = y[:, 2:]
        out[:, 3] *= 2
        out[:, 1, ..., 0] += 1
        out = out.masked_fill(out < -1, -1.0)
        out.clamp_(max=2).mul_(1.5)
        return cast(Tensor, out[..., ::2] + z[..., 1::2])


class Segmenter(nn.Module):
    """SegNet's pair of max-pool with indices and max-unpool."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.down(x)))
        small, indices = self.pool(y)
        return cast(Tensor, self.up(self.unpool(small, indices, output_size=y.size())))


class Dense(nn.Module):
    """Predictions at full resolution: interpolate, grid_sample, pixel_shuffle, unfold; sizes read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 8, 1)
        self.warp = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = self.c1(x).shape[-2:]
        y = F.pixel_shuffle(self.c2(self.c1(x)), 2)
        y = F.interpolate(y, size=(size[0] * 2, size[1] * 2), mode="bilinear", align_corners=False)
        grid = torch.tanh(self.warp(x)).permute(0, 2, 3, 1)
        z = F.grid_sample(y, grid, align_corners=False)
        if z.size(-1) != x.size(3):
            raise AssertionError
        return F.unfold(z + x, 2, stride=2).reshape(x.shape[0], -1, *z.shape[2:])


class Squeeze(nn.Module):
    """Squeeze-and-excitation, a depthwise convolution, PReLU, GroupNorm and InstanceNorm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.point = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(2, 4, 1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.PReLU(2), nn.Conv2d(2, 4, 1))
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.group(self.depth(self.point(x))))
        return cast(Tensor, self.instance(y * torch.sigmoid(self.squeeze(y))))


class Norms(nn.Module):
    """Batch normalisations of every kind of bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(2, 4, 1)
        self.average = nn.BatchNorm1d(4, momentum=None)
        self.bare = nn.BatchNorm1d(4, affine=False)
        self.batch = nn.BatchNorm1d(4, track_running_stats=False)
        self.layer = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return cast(Tensor, self.layer(self.batch(self.bare(self.average(y)) * 2) + y))


class Unet(nn.Module):
    """Two scales with cats; modules in lists, walked in both directions; Conv3d on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)])
        self.deep = nn.Conv3d(1, 1, 3, padding=1)
        self.ups = nn.ModuleList([nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for down in self.downs:
            x = F.relu(down(x), inplace=True)
            kept.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.deep(x.unsqueeze(1)).squeeze(1)
        for up, skip in zip(self.ups, reversed(kept), strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return x


# How modules hang together ------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """One module called twice, one under two names, one also held in a list and a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.alias = self.first
        self.listed = [self.last]

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(torch.relu(self.twice(self.first(x))))
        return cast(Tensor, self.listed[0](self.norm(self.norm(self.alias(y)))))


class Tied(nn.Module):
    """Embedding and output projection share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.out(torch.tanh(self.mix(self.embed(x)))))


class Tokens(nn.Module):
    """A small vision transformer: parameters of the root and of other modules that are no leaves."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 8, 4, stride=4)
        self.cls_token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(*[Attention() for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.heads = linear_heads(8, tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), y), dim=1) + self.positions
        y = self.norm(self.blocks(y))[:, 0]
        return {t: h(y) for t, h in self.heads.items()}


class Attention(nn.Module):
    """Scaled dot-product attention and an MLP, with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.gamma * self.proj(y)
        return cast(Tensor, x + self.mlp(x))


class Scaled(nn.Sequential):
    """A Sequential that owns a parameter and iterates over its children."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x * self.scale


class Lists(nn.Module):
    """Parameters in ParameterList and ParameterDict, used without a module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 6) for _ in range(2)])
        self.named = nn.ParameterDict({"bias": torch.randn(6), "scale": torch.randn(6)})
        self.bilinear = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for w in self.weights:
            y = torch.tanh(F.linear(y, w, self.named["bias"])) * self.named["scale"]
        return cast(Tensor, self.bilinear(x, y))


class Hooked(nn.Module):
    """Forward and pre-forward hooks that change values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.a.register_forward_hook(_halve)
        self.b.register_forward_pre_hook(_shift)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.b(torch.relu(self.a(x))))


def _halve(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    return out / 2


def _shift(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 1,)


# Sequences ----------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = kind(6, 5, batch_first=True, **options)
        self.out = nn.Linear(10 if options.get("bidirectional") else 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(self.embed(x))
        last = state[0] if isinstance(state, tuple) else state
        return cast(Tensor, self.out(y)[:, -1] + last.sum((0, 2)).unsqueeze(1))


class Cells(nn.Module):
    """A recurrence written out, with packed sequences beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gru, self.out = nn.LSTMCell(8, 4), nn.GRUCell(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state, other = None, torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for step in x.unbind(1):
            state = self.cell(step, state)
            other = self.gru(state[0], other)
        return cast(Tensor, self.out(other))


class Attending(nn.Module):
    """MultiheadAttention, self and cross, with masks; weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
        self.key = nn.Linear(8, 4)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y, weights = self.attend(x, x, x, key_padding_mask=padding)
        k = self.key(y)
        z, _ = self.cross(y, k, k, need_weights=False)
        return cast(Tensor, z.mean(1) + weights.mean((1, 2)).unsqueeze(1))


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(x)[:, 0])


class Padded(nn.Module):
    """A Transformer encoder on padded sequences, which turns to nested tensors in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor, *, padding: Tensor) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=padding)
        return cast(Tensor, y.masked_fill(padding[:, : y.shape[1]].unsqueeze(2), 0.0).sum(1))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(8, 8)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return cast(Tensor, self.decoder(x, self.memory(x), tgt_mask=mask, tgt_is_causal=True)[:, -1])


class Bags(nn.Module):
    """EmbeddingBag, index_select, gather, scatter_add, sort, topk, cumsum, where, one_hot."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.pick = nn.EmbeddingBag(11, 6, mode="mean"), nn.Embedding(11, 6, padding_idx=0)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bag(x) + self.pick(x).sum(1)
        z = self.out(y)
        values, order = z.topk(3, dim=1)
        z = z.scatter_add(1, order, values) + torch.zeros_like(z).scatter(1, order, values)
        z = torch.where(z > z.median(), z, z.cumsum(1)) + z.sort(dim=1, descending=True).values
        return cast(Tensor, z.gather(1, z.argsort(1)) + F.one_hot(z.argmax(1), 6).to(z.dtype))


class Spectral(nn.Module):
    """FFT, complex numbers, einsum, matmul with broadcasting, outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.mix = nn.Parameter(torch.randn(5, 8, dtype=torch.cfloat)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(x, n=8, dim=1)
        y = torch.fft.irfft(f * self.filter.to(f.dtype), n=8, dim=1)[:, : x.shape[1]]
        y = torch.einsum("bld,ble->bde", self.mix(y), x).abs().amax(2)
        return y + torch.view_as_real(f).sum((1, 2, 3)).unsqueeze(1)


# Parametrisations, checkpoints, state -------------------------------------------------------------------------------


class Parametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = weight_norm(nn.Linear(6, 6))
        self.s = spectral_norm(nn.Linear(6, 6))
        self.o = orthogonal(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.o(torch.relu(self.s(torch.relu(self.w(x))))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.b, self.a(x), use_reentrant=False)
        return cast(Tensor, checkpoint(self._again, y, x, use_reentrant=False))

    def _again(self, y: Tensor, x: Tensor) -> Tensor:
        return cast(Tensor, self.a(y * x) + y)


class Double(torch.autograd.Function):
    """A custom function, as fused kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] * w, (grads[0] * x).sum(0)


class Fused(nn.Module):
    """A leaf with a custom autograd Function in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, Double.apply(x, self.weight))  # type: ignore[no-untyped-call]


class Remembering(nn.Module):
    """A leaf with control flow on values and a moving average that it replaces."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("offset", torch.ones(6))
        self.scale = nn.Parameter(torch.ones(6))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if x.detach().norm() > 1e3:
            x = x / 1e3
        self.seen = x.detach().mean()
        return (x - self.mean) * self.scale


class Outer(nn.Module):
    """A module with children and a moving average, changed in place or replaced."""

    average: Tensor

    def __init__(self, *, replaces: bool = False) -> None:
        super().__init__()
        self.inner, self.replaces = nn.Linear(6, 6), replaces
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.training and self.replaces:
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        elif self.training:
            self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return cast(Tensor, y - self.average)


# Inputs and outputs -------------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """Returns its outputs in a container of the given kind."""

    def __init__(self, tasks: Sequence[str], kind: str) -> None:
        super().__init__()
        self.trunk, self.heads, self.kind = nn.Linear(6, 6), linear_heads(6, tasks), kind
        fields: Any = [(t, Tensor) for t in tasks]
        self.container: Any = NamedTuple("Named", fields) if kind == "tuple" else make_dataclass("Data", tasks)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.trunk(x))
        out = {t: h(y) for t, h in self.heads.items()}
        if self.kind == "ordered":
            return OrderedDict(out)
        if self.kind == "nested":
            return {t: {"logits": o, "all": [o, (y, o.argmax(1))], "n": 3} for t, o in out.items()}
        if self.kind == "extra":
            return {**out, "features": y, "input": x}
        return self.container(**out)


class Keywords(nn.Module):
    """Keyword inputs: a list of tensors, a dict, an optional and a flag; the layer order depends on the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(
        self, parts: list[Tensor], *, more: dict[str, Tensor], mask: Tensor | None = None, flip: bool
    ) -> Tensor:
        x = torch.cat(parts, 1) + more["x"]
        first, second = (self.b, self.a) if flip else (self.a, self.b)
        return cast(Tensor, second(torch.relu(first(x))) + (0 if mask is None else mask))


class Mixture(nn.Module):
    """MMoE: experts shared by all tasks, a gate per task."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()) for _ in range(3)])
        self.gates, self.heads = linear_heads(6, tasks, 3), linear_heads(5, tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        experts = torch.stack([e(x) for e in self.experts], 1)
        return {t: h((torch.softmax(self.gates[t](x), 1).unsqueeze(2) * experts).sum(1)) for t, h in self.heads.items()}


class SoftSharing(nn.Module):
    """Attention per task on a shared stem, through shared blocks (MTAN); a task's own values meet shared ones."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.masks = nn.ModuleDict(
            {t: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid()) for t in tasks}
        )
        self.shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.heads = linear_heads(8, tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        z = self.deep(F.relu(y))
        out = {}
        for t, head in self.heads.items():
            own = self.shared(self.masks[t](y) * z)
            out[t] = head(torch.cat([own, z], 1).mean((2, 3)))
        return out


class Distilling(nn.Module):
    """One task's detached prediction feeds the others: ownership by gradient alone would prune too much."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk, self.first = nn.Linear(6, 6), linear_heads(6, tasks)
        self.heads = linear_heads(6 + 2 * len(tasks), tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.trunk(x))
        first = {t: h(y) for t, h in self.first.items()}
        out = {}
        for t, head in self.heads.items():
            seen = [p if s == t else p.detach() for s, p in first.items()]
            out[t] = head(torch.cat([y, *seen], 1))
        return out


def _padding() -> dict[str, Any]:
    return {"padding": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])}


def _keywords() -> dict[str, Any]:
    return {"more": {"x": noise(4, 6)}, "flip": True}


def tokens(length: int = 5, batch: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (integers(11, batch, length),)


def returning(kind: str) -> Net:
    return Net(lambda tasks: Returning(tasks, kind), vectors())


ZOO: dict[str, Net] = {
    "mlp": Net(headed(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), 4), vectors()),
    "residual": Net(residual, images()),
    "resnet18": Net(lambda tasks: resnet.multifashion(2, tasks=tasks), images(1, 36)),
    "residual_swapped": Net(residual_swapped, images()),
    "concat": Net(headed(Concat, 128), images()),
    "slices": Net(headed(Slices, 128), images()),
    "segmenter": Net(headed(Segmenter, 192), images()),
    "dense": Net(headed(Dense, 128), images()),
    "squeeze": Net(headed(Squeeze, 256), images()),
    "norms": Net(headed(Norms, 24), lambda: (noise(3, 2, 6),)),
    "unet": Net(headed(Unet, 128), images()),
    "reused": Net(headed(Reused, 6), vectors()),
    "tied": Net(headed(Tied, 35), lambda: (integers(7, 3, 5),), together=("trunk.embed", "trunk.out")),
    "tokens": Net(Tokens, images()),
    "scaled": Net(headed(lambda: nn.Sequential(nn.Linear(6, 6), Scaled(nn.Linear(6, 4), nn.ReLU())), 4), vectors()),
    "lists": Net(headed(Lists, 4), vectors()),
    "hooked": Net(headed(Hooked, 4), vectors()),
    "lstm": Net(headed(lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2), 4), tokens()),
    "gru": Net(headed(lambda: Recurrent(nn.GRU, bidirectional=True), 4), tokens()),
    "rnn": Net(headed(lambda: Recurrent(nn.RNN, bias=False), 4), tokens()),
    "cells": Net(headed(Cells, 4), sequences()),
    "attending": Net(headed(Attending, 8), sequences(), _padding),
    "encoder": Net(headed(Encoder, 8), sequences()),
    "encoder_norm_first": Net(headed(lambda: Encoder(norm_first=True, activation="gelu"), 8), sequences()),
    "padded": Net(headed(Padded, 8), sequences(), _padding),
    "decoder": Net(headed(Decoder, 8), sequences()),
    "bags": Net(headed(Bags, 6), tokens()),
    "spectral": Net(headed(Spectral, 8), sequences()),
    "parametrised": Net(headed(Parametrised, 6), vectors()),
    "checkpointed": Net(headed(Checkpointed, 6), vectors()),
    "fused": Net(headed(lambda: nn.Sequential(nn.Linear(6, 6), Fused(), nn.Linear(6, 6)), 6), vectors()),
    "remembering": Net(headed(lambda: nn.Sequential(nn.Linear(6, 6), Remembering(), nn.Linear(6, 6)), 6), vectors()),
    "outer": Net(headed(lambda: nn.Sequential(nn.Linear(6, 6), Outer()), 6), vectors(), atomic=("trunk.1",)),
    "ordered": returning("ordered"),
    "nested": returning("nested"),
    "extra": returning("extra"),
    "named_tuple": returning("tuple"),
    "data_class": returning("data"),
    "keywords": Net(headed(Keywords, 6), lambda: ([noise(4, 2), noise(4, 4)],), _keywords),
    "mixture": Net(Mixture, vectors(), single=("heads.*", "gates.*")),
    "soft_sharing": Net(SoftSharing, images(), single=("heads.*", "masks.*")),
    "distilling": Net(Distilling, vectors(), single=("heads.*", "first.*")),
}
"""Every network by name."""


def dense(network: Any, width: int) -> Make:
    return lambda tasks: cast(nn.Module, network.dense(dict.fromkeys(tasks, 2), width=width))


LIBRARY: dict[str, Net] = {
    "segnet": Net(dense(segnet, 1), images(3, 32, batch=2)),
    "mtan": Net(dense(mtan, 1), images(3, 32, batch=2), single=("heads.*", "encoder_att.*", "decoder_att.*")),
    "mobilenet_raspp": Net(
        dense(mobilenet_raspp, 4),
        images(3, 64, batch=2),
    ),
}
"""The library's own dense networks, thin; too large for what runs over the whole zoo every time."""

NETS = {**ZOO, **LIBRARY}


def build(name: str, tasks: Sequence[str] = TASKS) -> nn.Module:
    """One of them, with weights of its own seed."""
    with torch.random.fork_rng():
        torch.manual_seed([*NETS].index(name))
        return NETS[name].make(tasks)


def shared_layers(name: str, model: nn.Module) -> list[list[str]]:
    """Sets of layers that can be split: each alone, tied ones together."""
    net = NETS[name]
    names = [x.name for x in find_layers(model) if not any(fnmatchcase(x.name, s) for s in net.single)]
    alone = [[n] for n in names if n not in net.together]
    return [*alone, list(net.together)] if net.together else alone


def sample(name: str) -> Any:
    """A network's inputs in double precision, as `split(sample=...)` takes them: by name where any has one."""
    net = NETS[name]
    args = transform(net.inputs(), lambda t: t.double() if t.is_floating_point() else t)
    keywords = transform(net.keywords(), lambda t: t.double() if t.is_floating_point() else t)
    if not keywords:
        return args
    first = {"attending": "x", "padded": "x", "keywords": "parts"}[name]
    return {first: args[0], **keywords}


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.p = 0.0
        if isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
            m.dropout = 0.0
    return model
