"""What a plan costs, for all tasks and for some: against networks of just these parts, written by hand and counted."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import Cost, cost, split, view
from zoo import TASKS, ZOO, build

SETS: list[tuple[str, ...]] = [("b",), ("c",), ("a", "b"), ("b", "c"), TASKS]


def counted(run: Callable[[], Any], parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor] = ()) -> Cost:
    """Count by PyTorch's own counter, and by the memory that autograd is handed for the backward."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with FlopCounterMode(display=False) as counter:
        run()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    own = {t.untyped_storage().data_ptr() for t in (*parameters, *buffers)}
    size = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    del out
    total = sum(p.numel() for p in {id(p): p for p in parameters}.values())
    return Cost(total, total * 4 / 2**20, counter.get_total_flops(), size)


class Net(nn.Module):
    """Two convolutions with BatchNorm and two heads per task, one of which looks at another task's features."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.c2, self.n2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.c3 = nn.Conv2d(6, 5, 1)
        self.heads = nn.ModuleDict({t: nn.Linear(80, i + 2) for i, t in enumerate(TASKS)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu_(self.n1(self.c1(x)))
        y = torch.relu_(self.n2(self.c2(y)))
        y = torch.relu(self.c3(y)).flatten(1)
        return {t: h(y) for t, h in self.heads.items()}


def by_hand(net: Net, groups: Sequence[tuple[str, ...]], tasks: Sequence[str], x: Tensor) -> Cost:
    """`Net` with c2 split into groups, as somebody would write it for some of its tasks only."""
    used = [tuple(t for t in g if t in tasks) for g in groups if any(t in tasks for t in g)]
    convs, norms = [copy.deepcopy(net.c2) for _ in used], [copy.deepcopy(net.n2) for _ in used]
    for n in norms:
        n.weight, n.bias = net.n2.weight, net.n2.bias
    heads = {t: copy.deepcopy(net.heads[t]) for t in tasks}
    first = copy.deepcopy(nn.Sequential(net.c1, net.n1))

    def run() -> dict[str, Tensor]:
        y = torch.relu_(first(x))
        out = {}
        for group, c, n in zip(used, convs, norms, strict=True):
            z = torch.relu(net.c3(torch.relu_(n(c(y))))).flatten(1)
            out.update({t: heads[t](z) for t in group})
        return out

    parts = nn.ModuleList([first, *convs, *norms, net.c3, *heads.values()])
    return counted(run, list(parts.parameters()), list(parts.buffers()))


def plans(draw: random.Random) -> Plan:
    """Any layers of the convolutions, each in any partition of the tasks."""
    layers = {}
    for name in draw.sample(["c1", "c2", "c3"], draw.randint(1, 3)):
        colours = {t: draw.randrange(3) for t in TASKS}
        layers[name] = [[t for t in TASKS if colours[t] == c] for c in sorted(set(colours.values()))]
    return Plan(tasks=TASKS, layers=layers)


@pytest.mark.parametrize("seed", range(6))
def test_a_refined_plan_costs_a_copy_for_every_two_tasks_that_either_plan_parts(seed: int) -> None:
    draw, net = random.Random(seed), Net()
    one, other = plans(draw), plans(draw)
    both = one.refine(other)
    expected = sum(p.numel() for p in net.parameters())
    for name in ("c1", "c2", "c3"):
        parts = [{t: k for k, g in enumerate(p.layers.get(name, (TASKS,))) for t in g} for p in (one, other)]
        copies = {tuple(part[t] for part in parts) for t in TASKS}
        expected += (len(copies) - 1) * sum(p.numel() for p in net.get_submodule(name).parameters())
    assert cost(net, both).parameters == expected
    assert cost(net, other.refine(one)).parameters == cost(net, both.refine(one)).parameters == expected
    x = torch.randn(3, 2, 8, 8)
    model = split(net, both, sample=x) if any(len(g) > 1 for g in both.layers.values()) else net
    assert sum(p.numel() for p in model.parameters()) == expected
    flops = [cast(int, cost(net, plan, sample=x).flops) for plan in (one, other, both)]
    assert max(flops) == flops[2]  # more is never cheaper
    with torch.no_grad():
        for task, out in net.eval()(x).items():
            torch.testing.assert_close(model.eval()(x)[task], out)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tasks", SETS, ids="+".join)
@pytest.mark.parametrize("groups", [(TASKS,), (("a", "c"), ("b",)), (("a",), ("b",), ("c",))], ids=str)
def test_some_tasks_cost_what_a_network_of_theirs_written_by_hand_costs(
    groups: tuple[tuple[str, ...], ...], tasks: tuple[str, ...], training: bool
) -> None:
    net, x = Net().train(training), torch.randn(3, 2, 8, 8)
    plan = Plan(tasks=TASKS, layers={"c2": [list(g) for g in groups]} if len(groups) > 1 else {})
    expected = by_hand(net, groups, tasks, x)
    if not training:  # without memory, BatchNorm keeps two empty statistics that it leaves out elsewhere
        norms = 4 + 6 * sum(1 for g in groups if set(g) & set(tasks))
        expected = replace(expected, activations=cast(int, expected.activations) + 2 * 4 * norms)
    assert cost(net, plan, sample=x, tasks=tasks) == expected
    assert cost(split(net, plan), sample=x, tasks=tasks) == expected
    if len(groups) == 1:  # before the split
        assert cost(net, sample=x, tasks=tasks) == expected
    if tasks == TASKS:
        assert cost(net, plan, sample=x) == expected


@pytest.mark.parametrize("name", ["residual", "tokens", "mixture", "soft_sharing", "distilling", "squeeze"])
def test_one_task_never_costs_more_than_its_view_and_all_tasks_are_the_whole(name: str) -> None:
    net, sample = build(name), ZOO[name].inputs()
    plan = Plan(
        tasks=TASKS, layers=[next(n for n, m in net.named_modules() if n and m._parameters and "heads" not in n)]
    )
    whole, model = cost(net, plan, sample=sample), split(net, plan, sample=sample)
    flops = 0
    for t in TASKS:
        one = cost(net, plan, sample=sample, tasks=[t])
        real = cost(view(model, t).module, sample=sample)
        assert None not in (one.flops, one.activations, real.flops, real.activations)
        assert one.parameters <= real.parameters and cast(int, one.flops) <= cast(int, real.flops)
        assert cast(int, one.activations) <= cast(int, real.activations)
        flops = max(flops, cast(int, one.flops))
    every = cost(net, plan, sample=sample, tasks=TASKS)
    assert flops < cast(int, every.flops) <= 3 * flops
    if name == "distilling":  # whose first heads are run for every task, because each hands its value to all
        assert cast(int, every.flops) < cast(int, whole.flops)
    else:
        assert every == whole


def test_values_that_pass_from_task_to_task_without_gradient_are_counted() -> None:
    net, x = build("distilling"), torch.randn(4, 6)
    one = cost(net, sample=x, tasks=["a"])
    firsts = 3 * 6 * 2 * 4 * 2  # all three first heads feed a's second one
    assert one.flops == 2 * 4 * 6 * 6 + firsts + 2 * 4 * 12 * 2
    assert one.parameters == sum(
        p.numel() for n, p in net.named_parameters() if not n.startswith(("heads.b", "heads.c"))
    )


def test_a_trunk_alone_and_its_tasks() -> None:
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(10, 6)
    plan = Plan(tasks=TASKS, layers=["2"])
    assert cost(net, plan, sample=x, tasks="a") == cost(net, sample=x) == cost(net, sample=x, tasks=["a"])
    two = cost(net, plan, sample=x, tasks=["a", "b"])
    assert two.flops == 2 * 10 * (6 * 5 + 2 * 5 * 4)
    assert two.parameters == 6 * 5 + 5 + 2 * (5 * 4 + 4)


def test_tasks_that_there_are_not_are_refused() -> None:
    net, x = Net(), torch.randn(3, 2, 8, 8)
    plan = Plan(tasks=TASKS, layers=["c2"])
    with pytest.raises(SplitError, match=r"'d'\].*Known: 'a', 'b', 'c'"):
        cost(net, plan, sample=x, tasks=["a", "d"])
    with pytest.raises(SplitError, match=r"no output for \['d'\]"):
        cost(net, sample=x, tasks=["a", "d"])
    with pytest.raises(SplitError, match="give `sample`"):
        cost(net, plan, tasks=["a"])
    with pytest.raises(SplitError, match="at least one"):
        cost(net, plan, sample=x, tasks=[])
