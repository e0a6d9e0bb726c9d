"""The supernet of BMTAS: a network with candidates in place of its blocks, mixed for one task at a time.

Reference: Bruggemann et al., Automated Search for Resource-Efficient Branched Multi-Task Networks, BMVC 2020, sec. 3.1.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import call
from reconmtl.errors import LayerMatchError, ProblemError, nearest


class Candidates(nn.Module):
    """Copies of a block, mixed by weights.

    Args:
        block: The block.
        count: How many copies.
    """

    def __init__(self, block: nn.Module, count: int) -> None:
        super().__init__()
        self.options = nn.ModuleList(copy.deepcopy(block) for _ in range(count))
        self.weights: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 the block's
        """The weighted sum of what the copies return."""
        assert self.weights is not None
        total: Tensor | None = None
        for weight, option in zip(self.weights, self.options, strict=True):
            if float(weight.detach()) == 0:  # during the warm-up all but one
                continue
            out = option(*args, **kwargs)
            if not isinstance(out, Tensor):
                raise ProblemError(
                    f"A block to be searched should return one tensor, {type(option).__name__} returned "
                    f"{type(out).__name__}; choose blocks that do."
                )
            total = weight * out if total is None else total + weight * out
        assert total is not None
        return total


class Supernet(nn.Module):
    """A network with candidates in place of its blocks, run for one task at a time.

    Args:
        model: The joint network; it is copied.
        blocks: Dotted names of the blocks, in the order in which they run.
        tasks: Names of the tasks.

    Raises:
        LayerMatchError: If the network has no module of such a name.
        ProblemError: If blocks lie inside one another, or there are fewer than two tasks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], tasks: Sequence[str]) -> None:
        super().__init__()
        known = dict(model.named_modules())
        unknown = [b for b in blocks if b not in known or not b]
        if unknown:
            raise LayerMatchError(
                " ".join(f"There is no block {b!r}. {nearest(b, filter(None, known))}" for b in unknown)
            )
        nested = [b for b in blocks for other in blocks if b != other and b.startswith(f"{other}.")]
        if nested or len(set(blocks)) != len(blocks) or not blocks or len(tasks) < 2:
            raise ProblemError(
                f"blocks = {list(blocks)}, tasks = {list(tasks)}: expected different blocks, none inside another "
                f"(found {nested}), and at least two tasks."
            )
        self.tasks, self.blocks = tuple(tasks), tuple(blocks)
        self.model = copy.deepcopy(model)
        for name in blocks:
            parent, _, key = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            setattr(owner, key, Candidates(self.model.get_submodule(name), len(self.tasks)))
        self.alphas = nn.Parameter(torch.zeros(len(blocks), len(self.tasks), len(self.tasks)))

    def forward(self, inputs: Any, task: str, weights: Tensor) -> Any:  # noqa: ANN401 the model's
        """The output of one task, whose candidates are mixed by weights [blocks, candidates]."""
        for name, row in zip(self.blocks, weights, strict=True):
            module = self.model.get_submodule(name)
            assert isinstance(module, Candidates)
            module.weights = row
        return call(self.model, inputs)[task]

    def own(self, task: int) -> Tensor:
        """Weights with which a task trains its own candidates only, [blocks, candidates]."""
        return nn.functional.one_hot(torch.full((len(self.blocks),), task), len(self.tasks)).to(self.alphas)

    def draw(self, task: int, temperature: float) -> Tensor:
        """Weights of one task's candidates, [blocks, candidates], differentiable in `alphas`."""
        return nn.functional.gumbel_softmax(self.alphas[:, task], tau=temperature, dim=1)

    def weights_of_network(self) -> list[nn.Parameter]:
        """All parameters but `alphas`."""
        return [p for p in self.parameters() if p is not self.alphas]
