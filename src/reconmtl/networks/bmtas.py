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
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reconmtl.batches import ALL, call, sets_of
from reconmtl.checkpoints import read_checkpoint, restore_model, save_checkpoint
from reconmtl.errors import Interrupted, ProblemError, ReconError, RunError
from reconmtl.evaluation import Machine
from reconmtl.forward import draw
from reconmtl.interruptions import interruption, was_asked
from reconmtl.layers import find_layers
from reconmtl.networks.resources import canonical, expected_groups, refine
from reconmtl.networks.supernet import Supernet
from reconmtl.plan import Plan
from reconmtl.problem import Problem
from reconmtl.progress import bar
from reconmtl.randomness import random_states, seeded, set_random_states
from reconmtl.sampling import Indices, Sampler

WARM_UP = 20
"""One of so many epochs comes before the search: every task trains its own candidates."""
SOFT, HARD = 5.0, 0.1
"""First and last temperature of the Gumbel-softmax."""


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
    checkpoint: Path | None = None,
) -> Tree:
    """Find a tree of tasks.

    A fifth of the training set trains the architecture, the rest the weights. In each step every task in turn updates
    the weights; then all tasks together, and the resource loss, update the architecture.

    Args:
        problem: What to learn; its recipe gives the batch size. Tasks may have data of their own.
        blocks: Dotted names of the blocks, in the order in which they run; None takes the model's own `blocks`.
        epochs: Length of the search.
        resource_weight: Of the expected billions of operations, summed over blocks; the published default is 0.05, the
            paper's values are 1.0 (Multi-Fashion+MNIST) and 0.1 (PASCAL-Context).
        lr: Of Adam on the weights.
        architecture_lr: Of Adam on the architecture.
        seed: Of weights, batches and draws.
        machine: Where and how it runs, and how often its state is saved. Several processes all search alike.
        checkpoint: File in which the search keeps its state, and from which one that was stopped goes on, to end as if
            it had not been stopped; None keeps nothing.

    Returns:
        The tree; train it with `rm.fit(problem, plan=tree.plan)`.

    Raises:
        ProblemError: If the blocks cannot be searched, or the training set is too small to be divided.
        LayerMatchError: If the network has no block of such a name.
        RunError: If the checkpoint is damaged, or of another search.
        Interrupted: If a signal asked for it; the state is saved where there is a file for it.

    Reference: Bruggemann et al., BMVC 2020, sections 3 and 4.1; Shi et al., Recon, ICLR 2023, section B.1.
    """
    if epochs < 1 or resource_weight < 0:
        raise ProblemError(
            f"epochs = {epochs}, resource_weight = {resource_weight}: expected 1 or more, and 0 or more."
        )
    with seeded(seed):
        model = problem.model()
        settings = _Settings(
            blocks=tuple(_blocks_of(model) if blocks is None else blocks),
            epochs=epochs,
            resource_weight=resource_weight,
            lr=lr,
            architecture_lr=architecture_lr,
            seed=seed,
        )
        return _Search(problem, model, settings, machine or Machine(), checkpoint).run()


@dataclass(frozen=True)
class _Settings:
    """What a search depends on beside its problem; see `search`."""

    blocks: tuple[str, ...]
    epochs: int
    resource_weight: float
    lr: float
    architecture_lr: float
    seed: int

    @property
    def warm_up(self) -> int:
        """Epochs before the architecture is searched."""
        return min(max(1, self.epochs // WARM_UP), self.epochs - 1)

    def temperature(self, epoch: int) -> float | None:
        """Of the draws in an epoch, counted from 0: falls in a line from soft to hard; None in the warm-up."""
        if epoch < self.warm_up:
            return None
        last = max(self.epochs - self.warm_up - 1, 1)
        return min(SOFT, SOFT - (epoch - self.warm_up) / last * (SOFT - HARD))


class _Search:
    """The state of one search; `_state` and `_restore` hold all of it that cannot be built again from the settings."""

    def __init__(
        self, problem: Problem, model: nn.Module, settings: _Settings, machine: Machine, checkpoint: Path | None
    ) -> None:
        self.problem, self.joint, self.settings, self.machine = problem, model, settings, machine
        self.checkpoint, self.saved = checkpoint, time.perf_counter()
        self.fabric, self.ranks = machine.fabric(), machine.ranks()
        self.sets = sets_of(problem.train)
        batch = problem.recipe.batch_size
        held_out = {own: len(data) // 5 for own, data in self.sets.items()}
        longest = max(len(data) - held_out[own] for own, data in self.sets.items())
        if min(held_out.values()) < 1 or longest < batch:
            sizes = " and ".join(str(len(data)) for data in self.sets.values())
            raise ProblemError(
                f"The training set's {sizes} samples do not make a batch of {batch} besides a held-out fifth."
            )
        order = torch.Generator().manual_seed(settings.seed)
        self.parts: dict[str, Tensor] = {}
        for own, data in self.sets.items():
            drawn = torch.randperm(len(data), generator=order)
            self.parts |= {
                _of("architecture", own): drawn[: held_out[own]],
                _of("weights", own): drawn[held_out[own] :],
            }
        self.sampler = Sampler(
            {key: len(part) for key, part in self.parts.items()},
            batch_size=batch,
            drop_last=True,
            seed=settings.seed,
            most=machine.max_batches,
        )
        self.net = Supernet(model, settings.blocks, problem.task_names)
        self.fabric.to_device(self.net)
        self.costs = operations(model, settings.blocks, problem.sample()).to(self.fabric.device)
        self.weights = torch.optim.Adam(self.net.weights_of_network(), lr=settings.lr, weight_decay=1e-4)
        self.architecture = torch.optim.Adam([self.net.alphas], lr=settings.architecture_lr, weight_decay=5e-5)
        self.epoch = 0

    def run(self) -> Tree:
        """Search to the end, from the checkpoint if there is one."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self._restore(self.checkpoint)
        else:
            self._save()  # a state or a disk that cannot be written to shows before the work
        epochs, steps = self.settings.epochs, self.sampler.steps
        self.net.train()
        with bar(
            epochs * steps,
            f"bmtas seed {self.settings.seed}",
            done=self.epoch * steps + self.sampler.step,
            hidden=self.ranks.rank > 0,
        ) as progress:
            while self.epoch < epochs:
                for indices in self.sampler.epoch():
                    self._step(indices)
                    progress.update()
                    self._save_if_due()
                self.epoch += 1
                self._save()
        return self._tree()

    def _step(self, indices: Indices) -> None:
        temperature = self.settings.temperature(self.epoch)
        if temperature is not None:
            self.architecture.zero_grad()
            for _, loss in self._losses("architecture", indices, temperature):
                self.fabric.backward(loss, inputs=[self.net.alphas])
            groups, _ = expected_groups(self.net.alphas.softmax(2))
            (self.settings.resource_weight * (groups * self.costs).sum()).backward()
            self.architecture.step()
        for task, loss in self._losses("weights", indices, temperature):
            self.weights.zero_grad()
            self.fabric.backward(loss)
            if not math.isfinite(float(loss.detach())):
                raise ProblemError(f"The loss of {task!r} is {float(loss.detach())}: lower lr = {self.settings.lr}.")
            self.weights.step()

    def _losses(self, part: str, indices: Indices, temperature: float | None) -> Iterator[tuple[str, Tensor]]:
        """Each task with its loss on a batch, one after another; tasks without targets in it are left out."""
        at = {own: self.parts[_of(part, own)][indices[_of(part, own)]] for own in self.sets}
        batches = draw(self.problem, self.problem.train, at, self.fabric.device)
        for t, name in enumerate(self.net.tasks):
            inputs, targets = batches[name if name in batches else ALL]
            if name not in targets:
                continue
            with self.fabric.autocast():
                drawn = self.net.own(t) if temperature is None else self.net.draw(t, temperature)
                output = self.net(inputs, name, drawn)
                loss = self.problem.losses({name: output}, {name: targets[name]})[name]
            yield name, loss

    def _tree(self) -> Tree:
        p = self.net.alphas.detach().softmax(2).cpu()
        chosen, blocks, tasks = p.argmax(2), self.settings.blocks, self.problem.task_names
        choices = {b: dict(zip(tasks, row.tolist(), strict=True)) for b, row in zip(blocks, chosen, strict=True)}
        return Tree(to_plan(self.joint, blocks, tasks, chosen), choices, p, self.costs.cpu(), expected_groups(p)[0])

    # Its state. -------------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        every, seconds = self.machine.checkpoint_steps, self.machine.checkpoint_seconds
        late = seconds is not None and time.perf_counter() - self.saved >= seconds
        asked, due = self.ranks.sum([float(was_asked()), float(late)])
        done = self.epoch * self.sampler.steps + self.sampler.step
        if asked or due or (every is not None and done % every == 0):
            self._save()
        if asked and self.checkpoint is None:
            raise interruption()
        if asked:
            where = f"epoch {self.epoch + 1} of {self.settings.epochs} of the search, {self.checkpoint}"
            raise Interrupted(interruption().signal, f"Saved in {where}. Repeat the command with --resume to go on.")

    def _about(self) -> dict[str, object]:
        return {"search": asdict(self.settings) | {"blocks": list(self.settings.blocks)}}

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        path = self.checkpoint
        state = {
            "epoch": self.epoch,
            "sampler": self.sampler.state(),
            "weights": self.weights.state_dict(),
            "architecture": self.architecture.state_dict(),
            "random": random_states(),
        }
        self.ranks.first(lambda: save_checkpoint(path, self.net, self._about(), training=state))
        self.saved = time.perf_counter()

    def _restore(self, source: Path) -> None:
        found = read_checkpoint(source)
        try:
            if found.about != self._about() or found.training is None:
                raise RunError(f"it belongs to another search, {found.about}, this one is {self._about()}.")
            state = found.training["state"]
            restore_model(self.net, found, source)
            self.epoch = int(state["epoch"])
            self.sampler.restore(state["sampler"])
            self.weights.load_state_dict(state["weights"])
            self.architecture.load_state_dict(state["architecture"])
            set_random_states(state["random"])  # last: nothing is drawn from here to the next step
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, ReconError) as error:
            told = str(error) if isinstance(error, ReconError) else f"{type(error).__name__}: {error}"
            raise RunError(
                f"{source} cannot be continued: {told} Delete this file to search from the beginning."
            ) from None


def _of(part: str, own: str) -> str:
    """How a part of a data set is called."""
    return part if own == ALL else f"{part}/{own}"


def _blocks_of(model: nn.Module) -> Sequence[str]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(b, str) for b in blocks):
        raise ProblemError(
            f"{type(model).__name__} has no list `blocks` with the names of its blocks: pass blocks=[...], e.g. "
            f"{[n for n, m in model.named_children() if next(m.parameters(), None) is not None][:4]}."
        )
    return blocks
