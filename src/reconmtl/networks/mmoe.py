"""Multi-gate mixture of experts, for any network that can be taken apart: experts are copies of its shared part.

Reference: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.errors import ProblemError
from reconmtl.networks.pieces import Stages, take_apart


class MMoE(nn.Module):
    """Experts that all tasks share, and a gate per task that mixes their features image by image.

    A gate is one linear layer on the mean of each input channel, followed by a softmax over the experts. That is our
    choice: the paper does not say what its gates see, and its printed size leaves room for few parameters.

    Args:
        make: A function without arguments that builds the joint network; it is called once per expert.
        experts: How many.

    Raises:
        ProblemError: If the network cannot be taken apart, or `experts` is no positive whole number.

    Reference: Ma et al., KDD 2018, equations 6 to 8; Shi et al., Recon, ICLR 2023, section B.1.

    Example:
        >>> from functools import partial
        >>> from reconmtl.networks import resnet
        >>> model = MMoE(partial(resnet.multifashion, width=4), experts=2)
        >>> {task: tuple(out.shape) for task, out in model(torch.rand(3, 1, 36, 36)).items()}
        {'digit': (3, 10), 'fashion': (3, 10)}
    """

    def __init__(self, make: Callable[[], nn.Module], *, experts: int = 2) -> None:
        super().__init__()
        if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
            raise ProblemError(f"experts = {experts!r}: expected a whole number, 1 or more.")
        parts = [take_apart(make()) for _ in range(experts)]
        self.experts = nn.ModuleList(Stages(*p.stages) for p in parts)
        self.gates = nn.ModuleDict({task: nn.LazyLinear(experts) for task in parts[0].heads})
        self.heads = nn.ModuleDict(dict(parts[0].heads))

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Images [B, C, H, W] (or inputs [B, C]) -> {task: output}."""
        seen = torch.stack([expert(x) for expert in self.experts], 1)
        pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
        out = {}
        for task, head in self.heads.items():
            weights = self.gates[task](pooled).softmax(1)
            out[task] = head((weights.reshape(*weights.shape, *(1,) * (seen.ndim - 2)) * seen).sum(1))
        return out


def mmoe(make: Callable[[], nn.Module], sample: Tensor, *, experts: int = 2) -> MMoE:
    """A mixture of experts whose gates fit an input.

    Args:
        make: Builds the joint network.
        sample: What it is called with, [B, C, ...]; only the number of channels matters.
        experts: How many.
    """
    model = MMoE(make, experts=experts)
    with torch.no_grad():
        for gate in model.gates.values():
            gate(sample.flatten(2).mean(2) if sample.ndim > 2 else sample)  # with this it is an nn.Linear
    return model


def gates_slower(model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
    """Parameter groups in which the gates have a learning rate of their own; for `Recipe(param_groups=...)`.

    Args:
        model: An `MMoE`, split or not.
        lr: Of the gates; the paper's is 1e-3 beside 0.1 for the rest.

    Reference: Shi et al., Recon, ICLR 2023, section B.1.
    """
    gates = [p for n, p in model.named_parameters() if n.startswith("gates.")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("gates.")]
    return [{"params": rest}, *([{"params": gates, "lr": lr}] if gates else [])]
