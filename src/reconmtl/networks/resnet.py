"""ResNet18 with a head per task: the paper's networks for Multi-Fashion+MNIST and CelebA, written anew.

Stem, four groups of two basic blocks, and what is shared after them hang at the root, so that the shared layers bear
the published names and come in the published order: conv1, bn1, layer1.0.conv1, layer1.0.bn1, ..., layer4.1.bn2, fc.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from reconmtl.errors import ProblemError
from reconmtl.networks.pieces import Pieces
from reconmtl.plan import check_tasks

# fmt: off
CELEBA_ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open",
    "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline",
    "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)
# fmt: on
"""The 40 attributes of CelebA, in the order of its annotation file."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection; [B, C, H, W] -> [B, C', H/stride, W/stride].

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, Figure 5, left.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """One residual step."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return cast(Tensor, self.relu(out))


class ResNet18(nn.Module):
    """What the networks of this file share: stem and four groups of blocks; subclasses add `shared` layers and heads.

    Args:
        channels: Of the input images.
        width: Channels after the stem; the groups have 1, 2, 4 and 8 times as many.
        tasks: Names of the tasks.
    """

    blocks: tuple[str, ...] = tuple(f"layer{group}.{block}" for group in range(1, 5) for block in range(2))
    """Parts between which the network may branch, after the stem."""

    def __init__(self, *, channels: int, width: int, tasks: Iterable[str]) -> None:
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ProblemError(f"width = {width!r}: expected a whole number of channels, 1 or more; the paper has 64.")
        self.tasks = check_tasks(tasks)
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _group(width, width, stride=1)
        self.layer2 = _group(width, 2 * width, stride=2)
        self.layer3 = _group(2 * width, 4 * width, stride=2)
        self.layer4 = _group(4 * width, 8 * width, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """The last group's feature maps.

        Args:
            x: [B, channels, H, W].

        Returns:
            [B, 8 * width, H / 32, W / 32], each side rounded up.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return cast(Tensor, self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def _blocks(self) -> list[nn.Module]:
        """Stem and groups, as stages."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        return [stem, self.layer1, self.layer2, self.layer3, self.layer4]


def _group(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride=stride), BasicBlock(outputs, outputs, stride=1))


class MultiFashionNet(ResNet18):
    """See `multifashion`."""

    blocks = (*ResNet18.blocks, "fc")

    def __init__(self, *, width: int, tasks: Iterable[str], classes: int) -> None:
        super().__init__(channels=1, width=width, tasks=tasks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, 100)
        self.heads = nn.ModuleDict({task: nn.Linear(100, classes) for task in self.tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 1, H, W] -> {task: logits [B, classes]}."""
        shared = self.relu(self.fc(torch.flatten(self.avgpool(self.features(x)), 1)))
        return {task: head(shared) for task, head in self.heads.items()}

    def pieces(self) -> Pieces:
        """Stem, four groups, and the layers after them, as stages."""
        last = nn.Sequential(self.avgpool, nn.Flatten(1), self.fc, self.relu)
        return Pieces([*self._blocks(), last], dict(self.heads.items()))


class CelebANet(ResNet18):
    """See `celeba`."""

    def __init__(self, *, width: int, tasks: Iterable[str]) -> None:
        super().__init__(channels=3, width=width, tasks=tasks)
        self.heads = nn.ModuleDict({task: nn.Linear(2 * 2 * 8 * width, 2) for task in self.tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, 64, 64] -> {task: logits [B, 2]}."""
        shared = torch.flatten(self.features(x), 1)
        return {task: head(shared) for task, head in self.heads.items()}

    def pieces(self) -> Pieces:
        """Stem and four groups, as stages."""
        return Pieces([*self._blocks(), nn.Flatten(1)], dict(self.heads.items()))


def multifashion(width: int = 64, *, tasks: Iterable[str] = ("digit", "fashion"), classes: int = 10) -> nn.Module:
    """The paper's network for Multi-Fashion+MNIST: ResNet18 with one input channel, 41 shared layers, a head per task.

    Args:
        width: Channels after the stem; 64 is the paper's (42.81 MB for two tasks).
        tasks: Names of the tasks; one name gives the single-task network.
        classes: Per task.

    Returns:
        A module: images [B, 1, 36, 36] -> {task: logits [B, classes]}.

    Raises:
        ProblemError: If the width is not a positive whole number.
        PlanError: If a task name cannot be used.

    Reference: Shi et al., Recon, ICLR 2023, section B.1; the network is that of Lin et al., Pareto MTL, NeurIPS 2019.

    Example:
        >>> {task: tuple(out.shape) for task, out in multifashion(width=8)(torch.zeros(2, 1, 36, 36)).items()}
        {'digit': (2, 10), 'fashion': (2, 10)}
    """
    return MultiFashionNet(width=width, tasks=tasks, classes=classes)


def celeba(width: int = 64, *, tasks: Iterable[str] = CELEBA_ATTRIBUTES) -> nn.Module:
    """The network whose size fits the paper's for CelebA: ResNet18, 40 shared layers, a head per attribute.

    The last feature maps, 2 x 2 for an image of 64 x 64, are flattened rather than averaged. Weights are random; the
    paper starts from ImageNet's, whose trunk has these very names.

    Args:
        width: Channels after the stem; 64 is the paper's (43.26 MB for 40 tasks).
        tasks: Names of the attributes.

    Returns:
        A module: images [B, 3, 64, 64] -> {attribute: logits [B, 2]}.

    Raises:
        ProblemError: If the width is not a positive whole number.
        PlanError: If a task name cannot be used.

    Reference: Shi et al., Recon, ICLR 2023, section B.5; Sener and Koltun, NeurIPS 2018.
    """
    return CelebANet(width=width, tasks=tasks)
