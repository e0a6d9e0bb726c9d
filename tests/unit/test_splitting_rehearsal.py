"""The first call is rehearsed on a copy: what passes between tasks is found, and nothing of the model is used up."""

import copy
import threading
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
from reconmtl.splitting import split, verify, view
from reconmtl.splitting.branched import Branched
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
@pytest.mark.parametrize("groups", [[["a"], ["b"], ["c"]], [["a", "c"], ["b"]]], ids=["each", "first-and-last"])
@pytest.mark.parametrize(("make", "step"), STATES, ids=lambda f: f.__name__)
def test_a_state_that_calls_for_one_task_leave_to_the_next_is_kept_per_task_or_refused(
    make: Callable[[], Any], step: Callable[[Any, Tensor], Tensor], groups: list[list[str]], layer: str, mode: str
) -> None:
    ANYWHERE.clear()
    plan = Plan(tasks=TASKS, layers={layer: groups})
    model = split(network(make, step), plan, mode=mode)
    if step is in_deque or (step is in_array and mode == "loop"):
        with torch.no_grad():
            for i, p in enumerate(cast(nn.Module, model.get_submodule(layer).per_task).parameters()):
                p.mul_(1 + 0.1 * i)
        twins = {t: copy.deepcopy(view(model, t)) for t in TASKS}
        for training in (True, True, False, True):
            out = model.train(training)(X)
            assert all(torch.equal(out[t], twins[t].train(training)(X)[t]) for t in TASKS)
            assert all(torch.equal(copy.deepcopy(view(model, t))(X)[t], copy.deepcopy(twins[t])(X)[t]) for t in TASKS)
        return
    for _ in range(2):
        with pytest.raises(SplitError, match=r"first call, task '.': output differs|writes to this tensor|noted in a"):
            model(X)
    if step is not in_global or len(groups) == len(TASKS):  # else it differs from itself as much
        with pytest.raises(SplitError, match=r"output|writes to this tensor|noted in a"):
            split(network(make, step), plan, mode=mode, sample=X)


class Parity(nn.Module):
    """What it does depends on whether the number of its calls is odd: first and last of three tasks would agree."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.notes = 0, cast(list[float], [])

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.notes.append(float(x.detach().mean()))
        return (x if self.calls % 2 else torch.tanh(x)) + self.notes[0]


@pytest.mark.parametrize("how", [{"mode": "loop"}, {"atomic": ["trunk.1"]}], ids=["loop", "atomic"])
def test_state_of_modules_in_what_runs_whole_is_each_tasks_own(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), Parity()))
    model = split(Headed(parts, 6, TASKS), Plan(tasks=TASKS, layers=["trunk.0"]), **how)
    with torch.no_grad():
        for i, p in enumerate(cast(nn.Module, model.get_submodule("trunk.0").per_task).parameters()):
            p.mul_(1 + 0.1 * i)
    if "atomic" in how:  # what one module notes of several tasks cannot be one list of numbers
        with pytest.raises(SplitError, match="noted in a list"):
            model(X)
        return
    twins = {t: copy.deepcopy(view(model, t)) for t in TASKS}
    for _ in range(3):
        out = model(X)
        assert all(torch.equal(out[t], twins[t](X)[t]) for t in TASKS)
        model = copy.deepcopy(model)


class Held(nn.Module):
    """Keeps what it computed, for its own next call and for whoever asks: in an attribute, a list and a hook's dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last, self.every = nn.Linear(6, 6), cast(Any, 0.0), cast(list[Tensor], [])
        self.kept: dict[str, Tensor] = {}
        self.linear.register_forward_hook(partial(keep, self.kept))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.every.append(self.kept["out"].detach().mean(0))
        z = y + self.last + torch.stack(self.every).sum(0)
        self.last = y.detach().mean(0)
        return cast(Tensor, z)


def keep(kept: dict[str, Tensor], _: nn.Module, __: Any, out: Tensor) -> None:
    kept["out"] = out


@pytest.mark.parametrize("where", ["trunk", "heads"])
def test_values_that_differ_and_are_kept_in_attributes_are_one_tasks_in_views_and_rehearsals(where: str) -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Held() if where == "trunk" else nn.Tanh()), 6, TASKS)
    if where == "heads":  # for one task alone
        net.heads["a"] = nn.Sequential(Held(), net.heads["a"])
    model = split(net, Plan(tasks=TASKS, layers=["trunk.0"]))
    with torch.no_grad():
        for i, p in enumerate(cast(nn.Module, model.get_submodule("trunk.0").per_task).parameters()):
            p.mul_(1 + 0.1 * i)
    twins: dict[str, nn.Module] = {t: view(copy.deepcopy(model), t) for t in TASKS}
    for training in (True, False, True):  # the second is rehearsed with what the first has left behind
        out = model.train(training)(X)
        assert all(torch.equal(out[t], twins[t].train(training)(X)[t]) for t in TASKS)
    for t in TASKS:
        assert torch.equal(view(model, t)(X)[t], twins[t](X)[t])


@pytest.mark.parametrize("mode", ["branch", "loop"])
def test_attributes_that_hold_themselves(mode: str) -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.tree = nn.Parameter(torch.ones(6)), cast(dict[str, Any], {"calls": 0, "below": []})
            self.tree["below"].append({"parent": self.tree})
            self.parent = SimpleNamespace(tree=self.tree)

        def forward(self, x: Tensor) -> Tensor:
            self.tree["calls"] += 1
            return cast(Tensor, x * self.weight * self.tree["below"][0]["parent"]["calls"])

    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Rooted()), 6, TASKS)
    model, twin = split(net, Plan(tasks=TASKS, layers=["trunk.0"]), mode=mode), copy.deepcopy(net)
    for _ in range(3):
        out, expected = model(X), twin(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    assert torch.equal(view(copy.deepcopy(model), "b")(X)["b"], twin(X)["b"])


@pytest.mark.parametrize("mode", ["branch", "loop"])
def test_a_dict_of_modules_and_values_is_kept_or_refused(mode: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.all: dict[str, Any] = {"linear": self.linear, "calls": 0}

        def forward(self, x: Tensor) -> Tensor:
            self.all["calls"] += 1
            return cast(Tensor, self.all["linear"](x) * self.all["calls"])

    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Mixed()), 6, TASKS)
    model, twin = split(net, Plan(tasks=TASKS, layers=["trunk.1.linear"]), mode=mode), copy.deepcopy(net)
    if mode == "loop":
        with pytest.raises(SplitError, match="writes into 'all', a dict that also holds modules"):
            model(X)
        return
    for _ in range(3):
        out, expected = model(X), twin(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)


class Leaving(nn.Module):
    """A leaf that leaves its input for its next call, which may be for a group of those tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.rand(6)), cast(Any, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y, self.last = x * self.weight + self.last, x.detach()
        return cast(Tensor, y)


def test_a_group_meets_what_its_tasks_left_one_by_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf, self.linear = Leaving(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.leaf(self.linear(self.leaf(x))))

    torch.manual_seed(0)
    net = Headed(Twice(), 6, TASKS)
    groups = {"trunk.leaf": [["a"], ["b", "c"]], "trunk.linear": [[t] for t in TASKS]}
    model, twin = split(net, Plan(tasks=TASKS, layers=groups)), copy.deepcopy(net)
    for training in (True, True, False):
        out, expected = model.train(training)(X), twin.train(training)(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)


class Averaging(nn.Module):
    """A forward that writes to parameters or plain tensors, as momentum encoders do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.online, self.slow, self.how = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False), how
        self.plain = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.how == "in place":
                self.slow.weight.mul_(0.9).add_(self.online.weight, alpha=0.1)
            elif self.how == "data":
                self.slow.weight.data = 0.9 * self.slow.weight.data + 0.1 * self.online.weight.data
            elif self.training:
                self.plain += 1.0
        return cast(Tensor, self.online(x) + self.slow(x) + self.plain)


@pytest.mark.parametrize("options", [{}, {"rehearse": False}, {"mode": "loop"}, {"atomic": ["trunk.1"]}], ids=str)
@pytest.mark.parametrize("how", ["in place", "data", "plain"])
def test_a_forward_that_writes_to_what_all_tasks_share_is_refused(how: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Averaging(how)), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=["trunk.0"]), **options)
    if how == "plain" and not ("mode" in options or "atomic" in options):  # is written once, as in an ordinary network
        twin = view(copy.deepcopy(model), "b")
        for _ in range(3):
            assert torch.equal(model(X)["b"], twin(X)["b"])
        return
    with pytest.raises(SplitError, match=r"trunk\.1\.(slow\.weight|plain): the forward writes to this tensor"):
        model(X)


class FunctionalStatistics(nn.Module):
    """Running statistics under names of its own, changed by a kernel that leaves no note of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("center", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        center, spread = cast(Tensor, self.center), cast(Tensor, self.spread)
        return torch.nn.functional.batch_norm(x, center, spread, self.scale, None, self.training)


@pytest.mark.parametrize("mode", ["branch", "loop"])
@pytest.mark.parametrize("layers", [["trunk.1"], ["trunk.0"]], ids=str)
def test_buffers_that_a_kernel_changes_unseen_are_kept_per_task(layers: list[str], mode: str) -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), FunctionalStatistics()), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=layers), mode=mode)
    twin = copy.deepcopy(net)
    for _ in range(3):
        model(X), twin(X)
    for t in TASKS:
        assert torch.equal(view(model, t).module.state_dict()["trunk.1.center"], twin.state_dict()["trunk.1.center"])


@pytest.mark.parametrize("mode", ["branch", "loop"])
def test_a_module_that_swaps_its_children_is_right_or_refused(mode: str) -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.first, self.second = self.second, self.first
            return cast(Tensor, torch.tanh(self.first(x)) + self.second(x))

    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Swapping()), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=["trunk.0"]), mode=mode)
    if mode == "loop":
        with pytest.raises(SplitError, match="replaces or adds modules in its forward"):
            model(X)
        return
    twin = copy.deepcopy(net)
    for _ in range(3):
        out, expected = model(X), twin(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)


def test_spectral_norm_of_a_layer_whose_group_gets_values_of_its_own_for_each_task() -> None:
    torch.manual_seed(0)
    normed = torch.nn.utils.spectral_norm(nn.Linear(6, 6))
    net = Headed(nn.Sequential(nn.Linear(6, 6), normed), 6, TASKS)
    plan = Plan(tasks=TASKS, layers={"trunk.0": [[t] for t in TASKS], "trunk.1": [["a", "b"], ["c"]]})
    for mode in ("branch", "loop"):
        model, twin = split(net, plan, mode=mode, sample=X), copy.deepcopy(net)
        for _ in range(3):
            out, expected = model(X), twin(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)


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


class Hooking(nn.Module):
    """Right in its output, wrong in its gradient, where it notices that it is split."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Branched and x.requires_grad:
            x.register_hook(lambda g: 2 * g)  # type: ignore[no-untyped-call]
        return cast(Tensor, self.linear(x))


def test_gradients_are_compared_in_the_first_call_that_has_any() -> None:
    torch.manual_seed(0)
    model = split(Headed(nn.Sequential(nn.Linear(6, 6), Hooking()), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.0"]))
    with torch.no_grad():
        model(X)
    with pytest.raises(SplitError, match=r"another mode, task 'a': gradient of trunk\.0\.per_task\.a\.weight differs"):
        model(X)


class Drop(nn.Module):
    """Dropout as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.linear(x), 0.5, self.training)[None]
        rate = 0.3 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=rate)[0]


class Path(nn.Module):
    """Random numbers that nothing turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x)) * (torch.rand(x.shape[0], 1) > 0.3 if self.training else 1)


@pytest.mark.parametrize(("kind", "random"), [(Drop, ()), (Path, ("train",))])
def test_dropout_that_is_called_as_a_function_is_off_in_rehearsals(
    kind: Callable[[], nn.Module], random: tuple[str, ...]
) -> None:
    model = split(Headed(nn.Sequential(nn.Linear(6, 6), kind()), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.0"]))
    assert verify(model, X).random == random
    torch.manual_seed(0)
    first = model(X)["a"]
    assert not torch.equal(first, model(X)["a"])


class Shaky(nn.Module):
    """Rounds otherwise in every call, as kernels with atomic additions do."""

    def __init__(self, amplified: bool) -> None:
        super().__init__()
        self.linear, self.amplified = nn.Linear(6, 6), amplified

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(0)
        y = cast(Tensor, self.linear(x)) * (1 + len(CALLS) % 7 * 3e-7)
        return y + torch.sin(y * 3e4) * 0.1 if self.amplified else y


CALLS: list[int] = []


def test_rounding_is_not_taken_for_another_value() -> None:
    plan = Plan(tasks=TASKS, layers=["trunk.0"])
    torch.manual_seed(0)
    found = verify(split(Headed(nn.Sequential(nn.Linear(6, 6), Shaky(False)), 6, TASKS), plan), X)
    assert 0 < found.output < 1e-5
    with pytest.raises(SplitError, match=r"also differs from itself when called again.*rehearse=False"):
        split(Headed(nn.Sequential(nn.Linear(6, 6), Shaky(True)), 6, TASKS), plan)(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ill_conditioned_networks_are_not_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(20)]
    net = Headed(nn.Sequential(nn.Linear(6, 6), *blocks), 6, TASKS).to(dtype)
    with torch.no_grad():
        net.trunk[3][0].weight.mul_(1e-3)  # type: ignore[index]
    x = X[:2].to(dtype) * 100
    assert verify(split(net, Plan(tasks=TASKS, layers=["trunk.0", "trunk.7.1"])), x).modes == ("train", "eval")


class Shares(nn.Module):
    """Stands no other values of its parameter than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.ones(6) / 6)

    def forward(self, x: Tensor) -> Tensor:
        if abs(float(self.shares.detach().sum()) - 1) > 1e-3:
            raise ValueError("no shares")
        return x * self.shares


def test_a_forward_that_does_not_stand_moved_copies_is_rehearsed_with_equal_ones() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), Shares()), 6, TASKS)
    model, plain = split(net, Plan(tasks=TASKS, layers=["trunk.1"])), net(X)
    assert all(torch.equal(v, plain[t]) for t, v in model(X).items())


class Noting(nn.Module):
    """Has a side effect outside of the model."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(0)
        return x


@pytest.mark.parametrize("sample", [None, X])
def test_without_rehearsal_the_user_code_runs_once_more_in_all(sample: Tensor | None) -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), Noting()), 6, TASKS)
    CALLS.clear()
    model = split(net, Plan(tasks=TASKS, layers=["trunk.0"]), sample=sample, rehearse=False)
    model(X)
    model.eval()(X)
    assert len(CALLS) == 1 + 2 * len(TASKS)


def test_hooks_of_parameters_are_not_called_by_rehearsals() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=["trunk.0"]))
    CALLS.clear()
    for p in model.parameters():
        p.register_hook(lambda _: CALLS.append(0))
    model(X)
    verify(model, X)
    assert not CALLS


def test_learning_keeps_no_values_for_a_backward_and_lets_a_forward_differentiate() -> None:
    class Slope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return x + torch.autograd.grad(torch.tanh(x).sum(), x, create_graph=True)[0]

    trunk = nn.Sequential(nn.Linear(6, 6), Slope(), nn.Linear(6, 6))
    assert verify(split(Headed(trunk, 6, TASKS), Plan(tasks=TASKS, layers=["trunk.0"])), X).random == ()


def test_what_cannot_be_copied_is_named() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), 6, TASKS)
    net.trunk[1].lock = threading.Lock()  # type: ignore[index]
    with pytest.raises(SplitError, match=r"trunk\.1\.lock \(lock\) cannot be copied .* __deepcopy__"):
        split(net, Plan(tasks=TASKS, layers=["trunk.0"]))


def test_a_call_on_the_meta_device_counts_for_nothing() -> None:
    plan = Plan(tasks=TASKS, layers=["trunk.0"])
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 6), Hooking()), 6, TASKS)
    model = split(net, plan).to("meta")
    model(X.to("meta"))
    assert verify(model, X.to("meta")).modes == ()
    model.to_empty(device="cpu").load_state_dict(split(net, plan).state_dict())
    with pytest.raises(SplitError, match=r"gradient of trunk\.0\.per_task\.a\.weight differs"):
        model(X)


class Around(nn.Module):
    """Reads its layer's weight by another way than the layer."""

    def __init__(self, read: Callable[[nn.Linear], Tensor]) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(6, 6), read

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read(self.linear)) + cast(Tensor, self.linear(x))


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.state_dict()["weight"],
        lambda m: dict(m.named_parameters())["weight"],
        lambda m: m._parameters["weight"],
        lambda m: m.get_parameter("weight"),
    ],
)
def test_copies_are_not_found_where_the_weight_was_and_this_is_said(read: Callable[[nn.Linear], Tensor]) -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), Around(read)), 6, TASKS)
    plan = Plan(tasks=TASKS, layers=["trunk.1.linear"])
    for sample in (None, X):
        with pytest.raises(SplitError, match=r"fails once the model is split .*trunk\.1.* read from the layer"):
            split(net, plan, sample=sample)(X)
    verify(split(net, plan, atomic=["trunk.1"]), X)


class Storing(nn.Module):
    """Replaces its buffer where modules keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self._buffers["mean"] = 0.9 * cast(Tensor, self.mean) + x.detach().mean(0)
        return cast(Tensor, self.linear(x) + self.mean)


def test_buffers_are_not_replaced_behind_the_back_of_their_module() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), Storing()), 6, TASKS)
    with pytest.raises(SplitError, match=r"trunk\.1 writes .* into its `_buffers`. .*self\.mean = "):
        split(net, Plan(tasks=TASKS, layers=["trunk.0"]))(X)


def test_an_empty_batch_shows_nothing() -> None:
    model = split(Headed(nn.Sequential(nn.Linear(6, 6), Hooking()), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.0"]))
    assert model(X[:0])["a"].shape == (0, 2)
    with pytest.raises(SplitError, match="gradient of"):
        model(X)
