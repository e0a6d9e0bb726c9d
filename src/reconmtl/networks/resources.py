"""How many copies of each block a randomly drawn tree of tasks needs, on average: the resource loss of BMTAS.

Every task t draws, in every block l, one of T candidates with probabilities p[l, t]. Two tasks share block l as long as
they drew the same candidate in it and in all blocks before; a block costs its operations times its number of groups.

`expected_groups` is exact by following the distribution over partitions of the tasks, which has Bell(T) members: 52 for
five tasks. For more tasks it is estimated from samples, without bias and with a standard error. The published code
enumerates too, but another model (`published_groups`): it counts every draw that is no refinement of the block before
as "all separate", although the tree that is built in the end refines.

Reference: Bruggemann et al., Automated Search for Resource-Efficient Branched Multi-Task Networks, BMVC 2020, sec. 3.3.
"""

import functools
import itertools

import torch
from torch import Tensor

from reconmtl.errors import ProblemError

EXACT = 5
"""Up to so many tasks the expectation is exact."""

Groups = tuple[int, ...]
"""A partition of tasks: the group of each of them, numbered in order of first appearance."""


def canonical(labels: tuple[int, ...]) -> Groups:
    """The partition that labels induce, independent of how the groups are called."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(x, len(numbers)) for x in labels)


def refine(parent: Groups, draw: Groups) -> Groups:
    """Groups that both partitions let share."""
    return canonical(tuple(p * len(draw) + d for p, d in zip(parent, draw, strict=True)))


@functools.cache
def partitions(tasks: int) -> tuple[Groups, ...]:
    """All partitions of so many tasks."""
    found = {canonical(labels) for labels in itertools.product(range(tasks), repeat=tasks)}
    return tuple(sorted(found))


@functools.cache
def _draws(tasks: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Every joint draw [draws, tasks], and the partition it induces, as a position in `partitions` [draws]."""
    index = {p: i for i, p in enumerate(partitions(tasks))}
    every = list(itertools.product(range(candidates), repeat=tasks))
    return torch.tensor(every), torch.tensor([index[canonical(d)] for d in every])


@functools.cache
def _refined(tasks: int) -> Tensor:
    """Position of the common refinement of any two partitions, [Bell, Bell]."""
    known = partitions(tasks)
    index = {p: i for i, p in enumerate(known)}
    return torch.tensor([[index[refine(a, b)] for b in known] for a in known])


def _induced(p: Tensor) -> Tensor:
    """Probability of each partition in each block, [blocks, Bell], if every task draws by p [blocks, T, candidates]."""
    draws, induced = _draws(p.shape[1], p.shape[2])
    draws, induced = draws.to(p.device), induced.to(p.device)
    each = torch.stack([p[:, t, draws[:, t]] for t in range(p.shape[1])]).prod(0)
    return p.new_zeros(len(p), len(partitions(p.shape[1]))).index_add(1, induced, each)


def _counts(tasks: int, like: Tensor) -> Tensor:
    return like.new_tensor([max(p) + 1 for p in partitions(tasks)])


def expected_groups(
    p: Tensor, *, samples: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Expected number of groups in each block.

    Args:
        p: Probabilities [blocks, T, candidates], each row summing to 1.
        samples: Estimate from so many draws; None is exact up to five tasks, and 64 draws beyond.
        generator: For the draws.

    Returns:
        Expectations [blocks], differentiable in p, and their standard errors [blocks], zero where exact.

    Raises:
        ProblemError: If p has another shape.
    """
    if p.ndim != 3:
        raise ProblemError(f"p has shape {list(p.shape)}: expected [blocks, tasks, candidates].")
    if samples is None and p.shape[1] <= EXACT:
        return _exact(p), torch.zeros(len(p))
    return _sampled(p, samples or 64, generator)


def _exact(p: Tensor) -> Tensor:
    tasks = p.shape[1]
    induced, counts, refined = _induced(p), _counts(tasks, p), _refined(tasks).to(p.device)
    now = torch.zeros_like(induced[0])
    now[partitions(tasks).index((0,) * tasks)] = 1
    found = []
    for draw in induced:
        joint = (now[:, None] * draw[None]).flatten()
        now = torch.zeros_like(now).index_add(0, refined.flatten(), joint)
        found.append((now * counts).sum())
    return torch.stack(found)


def _sampled(p: Tensor, samples: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Groups are counted by their first member: task t, drawn, is one if none before it would draw the same path.

    The others' probabilities of that path enter exactly, so that only one task is drawn at a time; the gradient with
    respect to its own probabilities comes from the score function.
    """
    blocks, tasks, candidates = p.shape
    drawn = torch.multinomial(p.detach().reshape(-1, candidates), samples, replacement=True, generator=generator).view(
        blocks, tasks, samples
    )  # of each task
    # probability that task u follows the path drawn for t up to each block: [blocks, u, t, samples]
    chosen = drawn[:, None].expand(-1, tasks, -1, -1).reshape(blocks, tasks, -1)
    follow = p.gather(2, chosen).view(blocks, tasks, tasks, samples).cumprod(0)
    earlier = torch.ones(tasks, tasks, dtype=torch.bool, device=p.device).triu(1)[None, :, :, None]  # u before t
    alone = torch.where(earlier, 1 - follow, 1.0).prod(1)  # [blocks, t, samples]
    own = p.gather(2, drawn).clamp(min=1e-30).log().cumsum(0)
    centered = alone.detach() - alone.detach().mean(2, keepdim=True)
    value = alone + centered * (own - own.detach())
    error = alone.detach().var(2).sum(1).div(samples).sqrt() if samples > 1 else torch.full((blocks,), float("nan"))
    return value.mean(2).sum(1), error


def published_groups(p: Tensor) -> Tensor:
    """The published expectation, [blocks]: draws that do not refine the block before count as all separate.

    Args:
        p: Probabilities [blocks, T, candidates] of at most five tasks.

    Raises:
        ProblemError: If there are more tasks.
    """
    tasks = p.shape[1]
    if tasks > EXACT:
        raise ProblemError(
            f"The published form enumerates {tasks}^{tasks} draws; it is meant for at most {EXACT} tasks."
        )
    known = partitions(tasks)
    coarser = torch.tensor([[refine(a, b) == b for a in known] for b in known], dtype=p.dtype)  # b refines a
    separate = known.index(tuple(range(tasks)))
    now = torch.zeros_like(_induced(p)[0])
    now[known.index((0,) * tasks)] = 1
    counts, found = _counts(tasks, p), []
    for draw in _induced(p):
        kept = draw * (coarser @ now)
        mask = torch.arange(len(known)) == separate
        now = torch.where(mask, 1 - kept[~mask].sum(), kept)
        found.append((now * counts).sum())
    return torch.stack(found)
