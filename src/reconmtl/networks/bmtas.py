"""BMTAS: search where a network should branch into groups of tasks. What it finds is a plan like any other.

For any network whose shared part has blocks one after another: each block gets as many candidates as there are tasks,
every task mixes candidates by weights that are drawn anew in every step (Gumbel-softmax, less and less soft), and a
loss on the expected cost of the drawn tree keeps tasks together. At the end every task takes its likeliest candidate;
tasks share a block as long as they took the same one in it and in all blocks before it. The plan is trained from
scratch.

Left out of the published search: normalisations without weight and bias at the end of each candidate, and resets of
Adam's state. Blocks are trained with the batch statistics throughout.

Reference: Bruggemann et al., Automated Search for Resource-Efficient Branched Multi-Task Networks, BMVC 2020.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reconmtl.batches import call
from reconmtl.errors import LayerMatchError, ProblemError, nearest
from reconmtl.evaluation import Machine
from reconmtl.layers import find_layers
from reconmtl.networks.resources import canonical, expected_groups, refine
from reconmtl.plan import Plan
from reconmtl.problem import Problem
from reconmtl.progress import bar
from reconmtl.randomness import seeded

WARM_UP = 20
"""One of so many epochs comes before the search: every task trains its own candidates."""
SOFT, HARD = 5.0, 0.1
"""First and last temperature of the Gumbel-softmax."""


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

    def draw(self, task: int, temperature: float) -> Tensor:
        """Weights of one task's candidates, [blocks, candidates], differentiable in `alphas`."""
        return nn.functional.gumbel_softmax(self.alphas[:, task], tau=temperature, dim=1)

    def weights_of_network(self) -> list[nn.Parameter]:
        """All parameters but `alphas`."""
        return [p for p in self.parameters() if p is not self.alphas]


@dataclass(frozen=True)
class Tree:
    """What a search found.

    Attributes:
        plan: Which layers are split into which groups of tasks.
        choices: {block: {task: candidate}}.
        probabilities: Of the candidates at the end, [blocks, tasks, candidates].
        operations: Of one copy of each block, in billions of multiply-adds times two, per sample.
        groups: Expected number of groups per block at the end, [blocks].
    """

    plan: Plan
    choices: dict[str, dict[str, int]]
    probabilities: Tensor
    operations: Tensor
    groups: Tensor


def to_plan(model: nn.Module, blocks: Sequence[str], tasks: Sequence[str], chosen: Tensor) -> Plan:
    """The plan of a tree.

    Args:
        model: The joint network.
        blocks: Names of its blocks, in order.
        tasks: Names of the tasks.
        chosen: The candidate that each task took in each block, [blocks, tasks].

    Returns:
        A plan that splits the layers of every block at or after the first difference; tasks once apart stay apart.
    """
    names = [layer.name for layer in find_layers(model)]
    groups = (0,) * len(tasks)
    layers: dict[str, list[list[str]]] = {}
    for block, row in zip(blocks, chosen.tolist(), strict=True):
        groups = refine(groups, canonical(tuple(row)))
        if max(groups) > 0:
            parts = [[t for t, g in zip(tasks, groups, strict=True) if g == k] for k in range(max(groups) + 1)]
            layers.update({n: parts for n in names if n == block or n.startswith(f"{block}.")})
    return Plan(tasks=tuple(tasks), layers=layers, chosen={"by": "bmtas"})


def operations(model: nn.Module, blocks: Sequence[str], inputs: Any) -> Tensor:  # noqa: ANN401 the model's
    """Billions of floating point operations of each block for one sample, [blocks]."""
    found = dict.fromkeys(blocks, 0.0)
    twin = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for name in blocks:
            module = twin.get_submodule(name)
            module.register_forward_pre_hook(
                lambda *_, name=name: found.update({name: found[name] - counter.get_total_flops()})
            )
            module.register_forward_hook(
                lambda *_, name=name: found.update({name: found[name] + counter.get_total_flops()})
            )
        call(twin, inputs)
    return torch.tensor([found[b] / 1e9 for b in blocks])


def search(
    problem: Problem,
    blocks: Sequence[str] | None = None,
    *,
    epochs: int,
    resource_weight: float = 0.05,
    lr: float = 1e-3,
    architecture_lr: float = 0.01,
    seed: int = 0,
    machine: Machine | None = None,
) -> Tree:
    """Find a tree of tasks.

    A fifth of the training set trains the architecture, the rest the weights. In each step every task in turn updates
    the weights; then all tasks together, and the resource loss, update the architecture.

    Args:
        problem: What to learn; its recipe gives the batch size.
        blocks: Dotted names of the blocks, in the order in which they run; None takes the model's own `blocks`.
        epochs: Length of the search.
        resource_weight: Of the expected billions of operations, summed over blocks; the published default is 0.05, the
            paper's values are 1.0 (Multi-Fashion+MNIST) and 0.1 (PASCAL-Context).
        lr: Of Adam on the weights.
        architecture_lr: Of Adam on the architecture.
        seed: Of weights, batches and draws.
        machine: Where and how it runs.

    Returns:
        The tree; train it with `rm.fit(problem, plan=tree.plan)`.

    Raises:
        ProblemError: If the blocks cannot be searched, or the training set is too small to be divided.
        LayerMatchError: If the network has no block of such a name.

    Reference: Bruggemann et al., BMVC 2020, sections 3 and 4.1; Shi et al., Recon, ICLR 2023, section B.1.
    """
    machine = machine or Machine()
    fabric = machine.fabric()
    if epochs < 1 or resource_weight < 0:
        raise ProblemError(
            f"epochs = {epochs}, resource_weight = {resource_weight}: expected 1 or more, and 0 or more."
        )
    size, batch = len(problem.train), problem.recipe.batch_size
    held_out = size // 5
    if held_out < 1 or size - held_out < batch:
        raise ProblemError(
            f"The training set's {size} samples do not make a batch of {batch} besides a held-out fifth."
        )
    with seeded(seed):
        joint = problem.model()
        names = list(_blocks_of(joint)) if blocks is None else list(blocks)
        net = Supernet(joint, names, problem.task_names)
        fabric.to_device(net)
        costs = operations(joint, names, problem.sample()).to(fabric.device)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        parts = {"architecture": order[:held_out], "weights": order[held_out:]}
        weights = torch.optim.Adam(net.weights_of_network(), lr=lr, weight_decay=1e-4)
        architecture = torch.optim.Adam([net.alphas], lr=architecture_lr, weight_decay=5e-5)
        warm_up = min(max(1, epochs // WARM_UP), epochs - 1)
        steps = min(math.ceil(len(parts["weights"]) / batch), machine.max_batches or size)
        shuffle = torch.Generator().manual_seed(seed)
        net.train()
        with bar(epochs * steps, f"bmtas seed {seed}") as progress:
            for epoch in range(epochs):
                temperature = _temperature(epoch, epochs, warm_up)
                batches = {
                    name: part[torch.randperm(len(part), generator=shuffle)].split(batch)
                    for name, part in parts.items()
                }
                for i, indices in enumerate(batches["weights"][:steps]):
                    if epoch >= warm_up:
                        architecture.zero_grad()
                        seen = batches["architecture"][i % len(batches["architecture"])]
                        for t, loss in _losses(problem, net, seen, temperature, fabric):
                            fabric.backward(loss, inputs=[net.alphas])
                            del t
                        groups, _ = expected_groups(net.alphas.softmax(2))
                        (resource_weight * (groups * costs).sum()).backward()
                        architecture.step()
                    for task, loss in _losses(problem, net, indices, temperature if epoch >= warm_up else None, fabric):
                        weights.zero_grad()
                        fabric.backward(loss)
                        if not math.isfinite(float(loss.detach())):
                            raise ProblemError(f"The loss of {task!r} is {float(loss.detach())}: lower lr = {lr}.")
                        weights.step()
                    progress.update()
    p = net.alphas.detach().softmax(2).cpu()
    chosen = p.argmax(2)
    choices = {
        b: dict(zip(problem.task_names, row.tolist(), strict=True)) for b, row in zip(names, chosen, strict=True)
    }
    plan = to_plan(joint, names, problem.task_names, chosen)
    return Tree(plan, choices, p, costs.cpu(), expected_groups(p)[0])


def _losses(problem: Problem, net: Supernet, indices: Tensor, temperature: float | None, fabric: Any) -> Any:  # noqa: ANN401
    """Each task with its loss on a batch, one after another; tasks without targets in it are left out."""
    inputs, targets = problem.batch(problem.train, indices, fabric.device)
    count = len(net.tasks)
    for t, name in enumerate(net.tasks):
        if name not in targets:
            continue
        own = torch.nn.functional.one_hot(torch.full((len(net.blocks),), t), count).float().to(fabric.device)
        drawn = own if temperature is None else net.draw(t, temperature)
        with fabric.autocast():
            output = net(inputs, name, drawn)
            loss = problem.restrict([name]).losses({name: output}, {name: targets[name]})[name]
        yield name, loss


def _temperature(epoch: int, epochs: int, warm_up: int) -> float:
    """Falls in a line from soft to hard after the warm-up."""
    last = max(epochs - warm_up - 1, 1)
    return min(SOFT, SOFT - (epoch - warm_up) / last * (SOFT - HARD))


def _blocks_of(model: nn.Module) -> Sequence[str]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(b, str) for b in blocks):
        raise ProblemError(
            f"{type(model).__name__} has no list `blocks` with the names of its blocks: pass blocks=[...], e.g. "
            f"{[n for n, m in model.named_children() if next(m.parameters(), None) is not None][:4]}."
        )
    return blocks
