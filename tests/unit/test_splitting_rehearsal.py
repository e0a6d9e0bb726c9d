"""The first call is rehearsed on a copy: what passes between tasks is found, and nothing of the model is used up."""

import copy
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import split, verify
from zoo import TASKS, Headed

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ANYWHERE: dict[str, Tensor] = {}


class State(nn.Module):
    """A leaf with a state of some kind, which its calls read and change."""

    def __init__(self, make: Callable[[], Any], step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.state, self.step = nn.Parameter(torch.ones(6)), make(), step

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y + self.step(self.state, y.detach().mean(0))


def in_deque(state: Any, mean: Tensor) -> Tensor:
    state.append(mean)
    return torch.stack(list(state)).sum(0)


def in_object(state: Any, mean: Tensor) -> Tensor:
    state.seen = getattr(state, "seen", 0) + mean
    return state.seen  # type: ignore[no-any-return]


def in_tensor(state: Any, mean: Tensor) -> Tensor:
    return state.add_(mean).clone()  # type: ignore[no-any-return]


def in_array(state: Any, mean: Tensor) -> Tensor:
    state += mean.numpy()
    return torch.from_numpy(state.copy())


def in_nested(state: Any, mean: Tensor) -> Tensor:
    state["deep"][0] = state["deep"][0] + mean
    return state["deep"][0]  # type: ignore[no-any-return]


def in_global(_: Any, mean: Tensor) -> Tensor:
    seen = ANYWHERE.get("seen", torch.zeros(6))
    ANYWHERE["seen"] = mean
    return seen


STATES: list[tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = [
    (deque, in_deque),
    (SimpleNamespace, in_object),
    (lambda: torch.zeros(6), in_tensor),
    (lambda: np.zeros(6, np.float32), in_array),
    (lambda: {"deep": [torch.zeros(6)]}, in_nested),
    (dict, in_global),
]


def network(make: Callable[[], Any], step: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Headed(nn.Sequential(nn.Linear(6, 6), State(make, step)), 6, TASKS)


@pytest.mark.parametrize("mode", ["branch", "loop"])
@pytest.mark.parametrize("layer", ["trunk.0", "trunk.1"])
@pytest.mark.parametrize(("make", "step"), STATES, ids=lambda f: f.__name__)
def test_a_state_that_calls_for_one_task_leave_to_the_next_is_refused(
    make: Callable[[], Any], step: Callable[[Any, Tensor], Tensor], layer: str, mode: str
) -> None:
    ANYWHERE.clear()
    plan = Plan(tasks=TASKS, layers=[layer])
    model = split(network(make, step), plan, mode=mode)
    for _ in range(2):
        with pytest.raises(SplitError, match=r"first call, task '.': output differs"):
            model(X)
    with pytest.raises(SplitError, match="output"):
        split(network(make, step), plan, mode=mode, sample=X)


class Counting(nn.Module):
    """Its output depends on the number of its calls and on what it has seen, kept in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls, self.seen = nn.Parameter(torch.ones(6)), 0, torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.seen = self.calls + 1, self.seen + x.detach().mean(0)
        return x * self.weight * self.calls + self.seen


@pytest.mark.parametrize("sample", [None, X])
@pytest.mark.parametrize("layer", ["trunk.0", "trunk.1"])
def test_rehearsals_leave_attributes_alone(layer: str, sample: Tensor | None) -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Counting()), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=[layer]), sample=sample)
    plain = copy.deepcopy(net)
    for _ in range(3):
        out, expected = model(X), plain(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    verify(model, X)
    out, expected = model(X), plain(X)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)


def test_statistics_inside_of_an_atomic_module_are_per_task_although_its_input_is_shared() -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=["trunk.0"]), atomic=["trunk"])
    verify(model, X)
    model(X)
    assert {n for n, _ in model.named_buffers() if "mean" in n} == {f"trunk.1.per_task.{t}.running_mean" for t in TASKS}


class Late(nn.Module):
    """Changes its buffer in later calls only, or in eval mode only."""

    seen: Tensor

    def __init__(self, when: Callable[["Late"], bool]) -> None:
        super().__init__()
        self.weight, self.calls, self.when = nn.Parameter(torch.ones(6)), 0, when
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.when(self):
            self.seen.add_(x.detach().mean(0))
        return x * self.weight - self.seen


@pytest.mark.parametrize("when", [lambda m: m.calls > 2, lambda m: not m.training], ids=["later", "eval"])
def test_a_buffer_that_was_constant_so_far_is_not_changed_for_one_task_after_the_other(when: Any) -> None:
    torch.manual_seed(0)
    model = split(Headed(nn.Sequential(nn.Linear(6, 6), Late(when)), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.0"]))
    model(X), model(X)
    with pytest.raises(SplitError, match=r"trunk\.1\.seen is changed by this call"):
        model.eval()(X)


class Sizes(nn.Module):
    """Looks at all parameters, in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(()) if self.training else torch.stack([p.sum() for p in self.parameters()]).sum()
        return self.linear(x) + total  # type: ignore[no-any-return]


def test_another_mode_is_rehearsed_too() -> None:
    torch.manual_seed(0)
    model = split(Headed(Sizes(), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.linear"]))
    model(X)
    for _ in range(2):
        with pytest.raises(SplitError, match="first call in another mode, task 'a': output differs"):
            model.eval()(X)
    model.train()(X)


def test_a_parameter_in_a_partial_function_is_refused() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.f = partial(nn.functional.linear, weight=self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.f(x) + self.linear(x))

    with pytest.raises(SplitError, match=r"trunk\.linear\.weight is also held in the attribute trunk\.f"):
        split(Headed(Bound(), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.linear"]))
