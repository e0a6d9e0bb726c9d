"""MTAN on SegNet: every task attends to the shared features by masks of its own. The paper's network for NYUv2.

The attention modules `encoder_att` and `decoder_att` belong to one task each; the convolutions that carry attended
features to the next stage, `encoder_block_att` and `decoder_block_att`, are shared, and follow SegNet's 52 layers in
the published order: 72 shared layers.

Those convolutions see every task's own features. Their running statistics are kept per task, in the joint network as in
a split one, so that no method is judged by mixed statistics; the published code mixes them.

Reference: Liu et al., End-to-End Multi-Task Learning with Attention, CVPR 2019.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.errors import ProblemError
from reconmtl.networks.pieces import Pieces
from reconmtl.networks.segnet import CITYSCAPES, NYUV2, SegNet, chosen


class TaskBatchNorm2d(nn.Module):
    """Batch normalisation whose weight and bias are shared, and whose running statistics are kept per task.

    Args:
        channels: Of the features.
        tasks: Names of the tasks.
    """

    def __init__(self, channels: int, tasks: Iterable[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.statistics = nn.ModuleDict({task: nn.BatchNorm2d(channels, affine=False) for task in tasks})

    def forward(self, x: Tensor, task: str) -> Tensor:
        """Normalise one task's features [B, C, H, W]."""
        normalised: Tensor = self.statistics[task](x)
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


class TaskConvLayer(nn.Module):
    """3x3 convolution with a bias, batch normalisation with statistics per task, ReLU."""

    def __init__(self, inputs: int, outputs: int, tasks: Iterable[str]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn1 = TaskBatchNorm2d(outputs, tasks)

    def forward(self, x: Tensor, task: str) -> Tensor:
        """One task's features [B, C, H, W] -> [B, C', H, W]."""
        return F.relu(self.bn1(self.conv1(x), task), inplace=True)


class Attention(nn.Sequential):
    """A mask in (0, 1) from features; [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.Sigmoid(),
        )


class MTAN(SegNet):
    """See `nyuv2` and `cityscapes`."""

    def _make_rest(self, outputs: Mapping[str, int]) -> None:
        f, tasks = self.filters, list(outputs)
        up, down = [*itertools.pairwise(f), (f[4], f[4])], [(f[0], f[0]), *zip(f[1:4], f, strict=False)]
        self.encoder_block_att = nn.ModuleList([TaskConvLayer(i, o, tasks) for i, o in up])
        self.decoder_block_att = nn.ModuleList([TaskConvLayer(i, o, tasks) for i, o in [*down, (f[4], f[4])]])
        enter = [(f[0], f[0]), *((2 * c, c) for c in f[1:])]
        leave = [(2 * f[0], f[0]), *((wide + narrow, narrow) for narrow, wide in itertools.pairwise(f))]
        self.encoder_att = nn.ModuleDict({t: nn.ModuleList([Attention(i, o) for i, o in enter]) for t in tasks})
        self.decoder_att = nn.ModuleDict({t: nn.ModuleList([Attention(i, o) for i, o in leave]) for t in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W], sides divisible by 32 -> {task: [B, channels, H, W]}."""
        encoder, unpooled, decoder = self.features(x)
        return {task: self._attend(task, encoder, unpooled, decoder) for task in self.heads}

    def _attend(
        self, task: str, encoder: list[tuple[Tensor, Tensor]], unpooled: list[Tensor], decoder: list[Tensor]
    ) -> Tensor:
        entering = cast(nn.ModuleList, self.encoder_att[task])
        leaving = cast(nn.ModuleList, self.decoder_att[task])
        carried: Tensor | None = None
        for stage, (first, last) in enumerate(encoder):
            mask = entering[stage](first if carried is None else torch.cat([first, carried], 1))
            carried = F.max_pool2d(self.encoder_block_att[stage](mask * last, task), 2, 2)
        assert carried is not None
        for up, last, stage in zip(unpooled, decoder, reversed(range(5)), strict=True):
            grown = F.interpolate(carried, size=up.shape[-2:], mode="bilinear", align_corners=True)
            grown = self.decoder_block_att[stage](grown, task)
            carried = leaving[stage](torch.cat([up, grown], 1)) * last
        return self.read(task, carried)

    def pieces(self) -> Pieces:
        """Not to be had.

        Raises:
            ProblemError: Always: every task has a path of its own through the network.
        """
        raise ProblemError(
            "MTAN cannot be taken apart into shared stages and heads: every task has a path of its own through it. "
            "Take SegNet."
        )


def cityscapes(width: int = 64, *, tasks: Iterable[str] | None = None) -> nn.Module:
    """MTAN for CityScapes: 72 shared layers, heads for 7 classes and depth.

    Args:
        width: Channels of the first stage; 64 is the paper's (157.19 MB).
        tasks: Some of semantic and depth; None takes both.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}.

    Raises:
        ProblemError: If the width is not a positive whole number or a task is unknown.

    Reference: Shi et al., Recon, ICLR 2023, Table 16.
    """
    return MTAN(chosen(CITYSCAPES, tasks), width=width, unit=())


def nyuv2(width: int = 64, *, tasks: Iterable[str] | None = None) -> nn.Module:
    """The paper's network for NYUv2: MTAN with 72 shared layers, heads for 13 classes, depth and unit normals.

    Args:
        width: Channels of the first stage; 64 is the paper's (168.72 MB).
        tasks: Some of semantic, depth and normal; None takes all.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}.

    Raises:
        ProblemError: If the width is not a positive whole number or a task is unknown.

    Reference: Shi et al., Recon, ICLR 2023, section B.3.
    """
    outputs = chosen(NYUV2, tasks)
    return MTAN(outputs, width=width, unit=[t for t in outputs if t == "normal"])


def dense(outputs: Mapping[str, int], *, width: int = 64, unit: Iterable[str] = ()) -> nn.Module:
    """MTAN for any dense tasks; see `reconmtl.networks.segnet.dense`."""
    return MTAN(outputs, width=width, unit=unit)
