"""SegNet with a head per task: the paper's network for CityScapes, and for NYUv2 in its appendix, written anew.

The trunk is cut into `encoder_block`, `decoder_block`, `conv_block_enc` and `conv_block_dec`, in this order, so that
the 52 shared layers bear the published names and come in the published order.

Reference: Badrinarayanan et al., SegNet, TPAMI 2017; in this form Liu et al., MTAN, CVPR 2019.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.errors import ProblemError, nearest
from reconmtl.networks.pieces import Pieces
from reconmtl.plan import check_tasks

CITYSCAPES = {"semantic": 7, "depth": 1}
"""Output channels of the tasks of CityScapes."""
NYUV2 = {"semantic": 13, "depth": 1, "normal": 3}
"""Output channels of the tasks of NYUv2."""


class ConvLayer(nn.Module):
    """3x3 convolution with a bias, batch normalisation, ReLU; [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class Features(NamedTuple):
    """What the trunk computes, stage by stage; [B, C, H, W] each. Encoder stages go down, decoder stages go up.

    Attributes:
        encoder: Per stage the features after its first layer and after its last.
        unpooled: Per stage what enters the decoder.
        decoder: Per stage the features after its last layer.
    """

    encoder: list[tuple[Tensor, Tensor]]
    unpooled: list[Tensor]
    decoder: list[Tensor]


class SegNet(nn.Module):
    """An encoder of five stages and its mirror image, joined by the positions of the pooled maxima, and heads.

    Args:
        outputs: Channels of each task's output.
        width: Channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        unit: Tasks whose output vectors are scaled to length one.
    """

    def __init__(self, outputs: Mapping[str, int], *, width: int, unit: Iterable[str]) -> None:
        super().__init__()
        check_dense(outputs, width=width, unit=unit)
        self.unit = tuple(unit)
        self.filters = f = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        up, down = [(3, f[0]), *itertools.pairwise(f)], [(f[0], f[0]), *zip(f[1:], f, strict=False)]
        self.encoder_block = nn.ModuleList([ConvLayer(i, o) for i, o in up])
        self.decoder_block = nn.ModuleList([ConvLayer(i, o) for i, o in down])
        self.conv_block_enc = nn.ModuleList([_stage(c, twice=i >= 2) for i, c in enumerate(f)])
        self.conv_block_dec = nn.ModuleList([_stage(o, twice=i >= 2) for i, (_, o) in enumerate(down)])
        self._make_rest(outputs)
        self.heads = nn.ModuleDict({task: Head(f[0], channels) for task, channels in outputs.items()})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))

    def _make_rest(self, outputs: Mapping[str, int]) -> None:
        """For networks that put more between trunk and heads."""

    def features(self, x: Tensor) -> Features:
        """Run the trunk.

        Args:
            x: Images [B, 3, H, W], sides of at least 32.

        Raises:
            ProblemError: If the images are too small to be halved five times.
        """
        if min(x.shape[-2:]) < 32:
            raise ProblemError(
                f"Images of {x.shape[-2]} x {x.shape[-1]} cannot be halved five times; give at least 32 x 32 pixels."
            )
        encoder, sizes, indices = [], [], []
        for enter, rest in zip(self.encoder_block, self.conv_block_enc, strict=True):
            first = enter(x)
            last = rest(first)
            encoder.append((first, last))
            sizes.append(last.shape[-2:])
            x, index = F.max_pool2d(last, 2, 2, return_indices=True)
            indices.append(index)
        unpooled, decoder = [], []
        for stage in reversed(range(5)):
            up = F.max_unpool2d(x, indices[stage], [2, 2], [2, 2], output_size=sizes[stage])
            x = self.conv_block_dec[stage](self.decoder_block[stage](up))
            unpooled.append(up)
            decoder.append(x)
        return Features(encoder, unpooled, decoder)

    def read(self, task: str, x: Tensor) -> Tensor:
        """A task's output from its features [B, width, H, W]."""
        out: Tensor = self.heads[task](x)
        return F.normalize(out, dim=1) if task in self.unit else out

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> {task: [B, channels, H, W]}."""
        shared = self.features(x).decoder[-1]
        return {task: self.read(task, shared) for task in self.heads}

    def pieces(self) -> Pieces:
        """Five stages down and five up; networks side by side exchange features after all but the lowest."""
        down = [Down(a, b) for a, b in zip(self.encoder_block, self.conv_block_enc, strict=True)]
        up = [Up(self.decoder_block[i], self.conv_block_dec[i]) for i in reversed(range(5))]
        heads = {t: nn.Sequential(h, Unit()) if t in self.unit else h for t, h in self.heads.items()}
        return Pieces([*down, *up], heads, exchange=(0, 1, 2, 3, 5, 6, 7, 8, 9))


class Down(nn.Module):
    """A stage of the encoder: the state grows by where the maxima were, and by the size they came from."""

    def __init__(self, enter: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.enter, self.rest = enter, rest

    def forward(self, state: Any) -> Any:  # noqa: ANN401 a state
        """Features [B, C, H, W] -> [B, C', H/2, W/2]."""
        x, *before = state if isinstance(state, tuple) else (state,)
        x = self.rest(self.enter(x))
        pooled, index = F.max_pool2d(x, 2, 2, return_indices=True)
        return (pooled, *before, (index, x.shape[-2:]))


class Up(nn.Module):
    """A stage of the decoder: the state shrinks by what the last unused stage of the encoder left."""

    def __init__(self, enter: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.enter, self.rest = enter, rest

    def forward(self, state: Any) -> Any:  # noqa: ANN401 a state
        """Features [B, C, H, W] -> [B, C', 2H, 2W]."""
        x, *before, (index, size) = state
        x = F.max_unpool2d(x, index, [2, 2], [2, 2], output_size=size)
        return (self.rest(self.enter(x)), *before)


class Unit(nn.Module):
    """Scales vectors along the channels to length one."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return F.normalize(x, dim=1)


class Head(nn.Sequential):
    """A 3x3 and a 1x1 convolution with nothing between them; [B, C, H, W] -> [B, channels, H, W]."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__(nn.Conv2d(inputs, inputs, 3, padding=1), nn.Conv2d(inputs, channels, 1))


def check_dense(outputs: Mapping[str, int], *, width: int, unit: Iterable[str] = ()) -> None:
    """Refuse what no dense network can be built from.

    Raises:
        PlanError: If a task name cannot be used.
        ProblemError: If width or channels are no positive whole numbers, or `unit` names no task.
    """
    check_tasks(outputs)
    faults = []
    if not _is_count(width):
        faults.append(f"width = {width!r}: expected a whole number of channels, 1 or more; the paper has 64.")
    faults += [
        f"Task {task!r} has {channels!r} output channels: expected a whole number, 1 or more."
        for task, channels in outputs.items()
        if not _is_count(channels)
    ]
    faults += [f"unit: {nearest(task, outputs)} No task is called {task!r}." for task in unit if task not in outputs]
    if faults:
        raise ProblemError("\n".join(faults))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _stage(channels: int, *, twice: bool) -> nn.Module:
    return nn.Sequential(*(ConvLayer(channels, channels) for _ in range(2))) if twice else ConvLayer(channels, channels)


def chosen(available: Mapping[str, int], tasks: Iterable[str] | None) -> dict[str, int]:
    """The outputs of some tasks, in the order given; all of them for None.

    Raises:
        ProblemError: If a task is unknown; all of them are named.
    """
    names = tuple(available) if tasks is None else tuple(tasks)
    unknown = [t for t in names if t not in available]
    if unknown:
        raise ProblemError(" ".join(f"Unknown task {t!r}. {nearest(t, available)}" for t in unknown))
    return {task: available[task] for task in names}


def dense(outputs: Mapping[str, int], *, width: int = 64, unit: Iterable[str] = ()) -> nn.Module:
    """SegNet for any dense tasks.

    Args:
        outputs: Channels of each task's output, e.g. `{"semantic": 13, "depth": 1}`.
        width: Channels of the first stage.
        unit: Tasks whose output vectors are scaled to length one, e.g. normals.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}; logits for classes.

    Raises:
        ProblemError: If the width or a number of channels is not a positive whole number.
        PlanError: If a task name cannot be used.

    Reference: Liu et al., MTAN, CVPR 2019, section 4.1 (the trunk).

    Example:
        >>> import torch
        >>> model = dense({"depth": 1, "edge": 1}, width=4)
        >>> {task: tuple(out.shape) for task, out in model(torch.zeros(2, 3, 32, 64)).items()}
        {'depth': (2, 1, 32, 64), 'edge': (2, 1, 32, 64)}
    """
    return SegNet(outputs, width=width, unit=unit)


def cityscapes(width: int = 64, *, tasks: Iterable[str] | None = None) -> nn.Module:
    """The paper's network for CityScapes: SegNet with 52 shared layers, heads for 7 classes and depth.

    Args:
        width: Channels of the first stage; 64 is the paper's (95.43 MB).
        tasks: Some of semantic and depth; None takes both, one gives a single-task network.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}.

    Raises:
        ProblemError: If the width is not a positive whole number or a task is unknown.

    Reference: Shi et al., Recon, ICLR 2023, section B.2.
    """
    return SegNet(chosen(CITYSCAPES, tasks), width=width, unit=())


def nyuv2(width: int = 64, *, tasks: Iterable[str] | None = None) -> nn.Module:
    """The paper's other network for NYUv2: SegNet with heads for 13 classes, depth and unit normals.

    Args:
        width: Channels of the first stage; 64 is the paper's (95.58 MB).
        tasks: Some of semantic, depth and normal; None takes all, one gives a single-task network.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}.

    Raises:
        ProblemError: If the width is not a positive whole number or a task is unknown.

    Reference: Shi et al., Recon, ICLR 2023, Table 15.
    """
    outputs = chosen(NYUV2, tasks)
    return SegNet(outputs, width=width, unit=[t for t in outputs if t == "normal"])
