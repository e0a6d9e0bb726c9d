"""MobileNetV2 with R-ASPP and a DeepLabV3+ decoder per task: its size fits the network of the paper for PASCAL-Context.

The trunk is `features.0` to `features.17`, named as in torchvision, so that ImageNet weights load; its last convolution
is left out, and the last stage is dilated instead of strided (output stride 16). 108 shared layers with `raspp`.

Reference: Sandler et al., MobileNetV2, CVPR 2018; Chen et al., DeepLabV3+, ECCV 2018; the combination is that of
Bruggemann et al., BMTAS, BMVC 2020.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.networks.segnet import check_dense, chosen

PASCAL_CONTEXT = {"semantic": 21, "parts": 7, "saliency": 1, "normal": 3}
"""Output channels of the tasks that the paper trains; `edge`, with one channel, is the field's fifth."""
EDGE = {"edge": 1}

# Channels in and out, stride, expansion, dilation. The first dilated block would have been strided, so it is neither.
# fmt: off
BLOCKS = (
    (32, 16, 1, 1, 1), (16, 24, 2, 6, 1), (24, 24, 1, 6, 1), (24, 32, 2, 6, 1), (32, 32, 1, 6, 1), (32, 32, 1, 6, 1),
    (32, 64, 2, 6, 1), (64, 64, 1, 6, 1), (64, 64, 1, 6, 1), (64, 64, 1, 6, 1), (64, 96, 1, 6, 1), (96, 96, 1, 6, 1),
    (96, 96, 1, 6, 1), (96, 160, 1, 6, 1), (160, 160, 1, 6, 2), (160, 160, 1, 6, 2), (160, 320, 1, 6, 2),
)
# fmt: on
LOW = 4
"""Trunk modules up to where the decoders take their fine features: 1/4 of the image's side."""


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU6; padded so that stride 1 keeps the size."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(
                inputs,
                outputs,
                kernel,
                stride=stride,
                padding=dilation * (kernel - 1) // 2,
                dilation=dilation,
                groups=groups,
                bias=False,
            ),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; [B, C, H, W] -> [B, C', H/stride, W/stride].

    Reference: Sandler et al., MobileNetV2, CVPR 2018, Figure 4.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int, dilation: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.conv = nn.Sequential(
            *([ConvNorm(inputs, inner)] if expansion > 1 else []),
            ConvNorm(inner, inner, 3, stride=stride, groups=inner, dilation=dilation),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class RASPP(nn.Module):
    """Features beside their mean over the image; [B, C, H, W] -> [B, C', H, W].

    Reference: Sandler et al., MobileNetV2, CVPR 2018, section 6.3; dropout and the fusing layer of Bruggemann et al.,
    BMTAS, BMVC 2020.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.local = ConvNorm(inputs, outputs)
        self.pooled = ConvNorm(inputs, outputs)
        self.dropout = nn.Dropout(0.1)
        self.fuse = ConvNorm(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse both."""
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return cast(Tensor, self.fuse(self.dropout(torch.cat([self.local(x), pooled], 1))))


class Decoder(nn.Module):
    """A task's own: fine and coarse features to its output at a quarter of the image's side."""

    def __init__(self, low: int, coarse: int, narrowed: int, channels: int) -> None:
        super().__init__()
        both = narrowed + coarse
        self.low = ConvNorm(low, narrowed)
        self.rest = nn.Sequential(
            ConvNorm(both, both, 3, groups=both),
            ConvNorm(both, coarse),
            ConvNorm(coarse, coarse, 3, groups=coarse),
            ConvNorm(coarse, coarse),
            nn.Conv2d(coarse, channels, 1),
        )

    def forward(self, low: Tensor, coarse: Tensor) -> Tensor:
        """[B, C, H/4, W/4] and [B, C', H/16, W/16] -> [B, channels, H/4, W/4]."""
        grown = F.interpolate(coarse, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return cast(Tensor, self.rest(torch.cat([self.low(low), grown], 1)))


class MobileNetRASPP(nn.Module):
    """See `dense`."""

    blocks = (*(f"features.{i}" for i in range(1, len(BLOCKS) + 1)), "raspp")
    """Parts between which the network may branch, after the stem."""

    def __init__(self, outputs: Mapping[str, int], *, width: int, unit: Iterable[str]) -> None:
        super().__init__()
        check_dense(outputs, width=width, unit=unit)
        self.unit = tuple(unit)

        def scaled(channels: int) -> int:
            return max(1, channels * width // 32)

        blocks = [
            InvertedResidual(scaled(i), scaled(o), stride=stride, expansion=expansion, dilation=dilation)
            for i, o, stride, expansion, dilation in BLOCKS
        ]
        self.features = nn.Sequential(ConvNorm(3, scaled(32), 3, stride=2), *blocks)
        self.raspp = RASPP(scaled(320), scaled(128))
        self.heads = nn.ModuleDict(
            {t: Decoder(scaled(24), scaled(128), scaled(48), channels) for t, channels in outputs.items()}
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> {task: [B, channels, H, W]}."""
        low = self.features[:LOW](x)
        coarse = self.raspp(self.features[LOW:](low))
        return {task: self._grow(task, head(low, coarse), x) for task, head in self.heads.items()}

    def _grow(self, task: str, out: Tensor, x: Tensor) -> Tensor:
        out = F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return F.normalize(out, dim=1) if task in self.unit else out


def dense(outputs: Mapping[str, int], *, width: int = 32, unit: Iterable[str] = ()) -> nn.Module:
    """MobileNetV2 with R-ASPP and decoders for any dense tasks.

    With batches of one image the mean over the image has a single value per channel: train with two or more.

    Args:
        outputs: Channels of each task's output.
        width: Channels of the stem; 32 is MobileNetV2's, the others scale along.
        unit: Tasks whose output vectors are scaled to length one.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}.

    Raises:
        ProblemError: If the width or a number of channels is not a positive whole number.
        PlanError: If a task name cannot be used.

    Reference: Bruggemann et al., Automated Search for Resource-Efficient Branched Multi-Task Networks, BMVC 2020.
    """
    return MobileNetRASPP(outputs, width=width, unit=unit)


def pascal_context(width: int = 32, *, tasks: Iterable[str] | None = None) -> nn.Module:
    """The network whose size fits the paper's for PASCAL-Context: 108 shared layers, four decoders.

    Weights are random; the paper starts from ImageNet's, see `reconmtl.networks.pretrained`.

    Args:
        width: Channels of the stem; 32 is the paper's (8.04 MB for four tasks).
        tasks: Some of semantic, parts, saliency, normal and edge; None takes the paper's four.

    Returns:
        A module: images [B, 3, H, W] -> {task: [B, channels, H, W]}.

    Raises:
        ProblemError: If the width is not a positive whole number or a task is unknown.

    Reference: Shi et al., Recon, ICLR 2023, section B.4.
    """
    outputs = chosen(PASCAL_CONTEXT | EDGE, PASCAL_CONTEXT if tasks is None else tasks)
    return MobileNetRASPP(outputs, width=width, unit=[t for t in outputs if t == "normal"])
