import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import LayerMatchError, SplitError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting import load_shared, saved_plan, split, verify, view
from zoo import TASKS, ZOO, Block, Headed, residual


def plan(*layers: str, tasks: Sequence[str] = TASKS) -> Plan:
    return Plan(tasks=tasks, layers=layers)


def independent(model: nn.Module, x: Tensor, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
    """What one deep copy per task returns."""
    return {t: copy.deepcopy(model)(x)[t] for t in tasks}


def split_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(x)
    torch.stack([(i + 1) * out[t].square().sum() for i, t in enumerate(TASKS)]).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def perturb(model: nn.Module, seed: int = 3) -> None:
    """Make the copies differ, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return residual(TASKS)


@pytest.fixture
def x() -> Tensor:
    return cast(Tensor, ZOO["residual"].inputs()[0])


SETS = [
    ["trunk.0.conv1"],
    ["trunk.0.down.0"],
    ["trunk.1.bn1"],
    ["trunk.1.conv2", "trunk.0.bn2"],
    ["trunk.*"],
    [],
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", SETS, ids=str)
def test_the_start_is_the_original_bit_for_bit(net: nn.Module, x: Tensor, layers: list[str], training: bool) -> None:
    net.train(training)
    expected = independent(net, x)
    out = split(net, plan(*layers))(x)
    assert list(out) == list(TASKS)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)


@pytest.mark.parametrize("layers", SETS, ids=str)
def test_gradients_are_those_of_one_network_per_task(net: nn.Module, x: Tensor, layers: list[str]) -> None:
    net.double()
    x = x.double()
    model = split(net, plan(*layers))
    mine = split_gradients(model, x)
    total: dict[str, Tensor] = {}
    for i, t in enumerate(TASKS):
        alone = copy.deepcopy(net)
        ((i + 1) * alone(x)[t].square().sum()).backward()
        for name, p in alone.named_parameters():
            if p.grad is None:
                continue
            owner, _, key = name.rpartition(".")
            key = f"{owner}.per_task.{t}.{key}" if f"{owner}.per_task.{t}.{key}" in mine else name
            total[key] = total.get(key, torch.zeros_like(p)) + p.grad
    assert mine.keys() == total.keys()
    scale = max(float(g.abs().max()) for g in total.values())
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-10, atol=1e-10 * scale)


def test_a_task_reaches_only_its_copies_and_the_shared_layers(net: nn.Module, x: Tensor) -> None:
    model = split(net, plan("trunk.1.conv1"))
    model(x)["b"].sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert "trunk.1.conv1.per_task.b.weight" in reached
    assert not [n for n in reached if "per_task.a" in n or "per_task.c" in n or "heads.a" in n or "heads.c" in n]
    assert {"trunk.0.conv1.weight", "trunk.1.conv2.weight", "heads.b.weight"} <= reached


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("layer", ["conv1", "bn1", "conv2", "bn2"])
def test_every_task_keeps_its_skip_connection(x: Tensor, layer: str, swap: bool) -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Conv2d(2, 4, 1), Block(4, 4, swap=swap)), 256, TASKS)
    model = split(net, plan(f"trunk.1.{layer}"))
    with torch.no_grad():
        for t in TASKS[1:]:  # the published code lost the skip of every task but the first
            cast(Any, model).trunk[1].get_submodule(layer).per_task[t].weight.zero_()
        cast(Any, model).trunk[1].bn2.weight.zero_() if layer != "bn2" else None
    model.eval()
    out = model(x)
    for t in TASKS[1:]:
        net.eval()
        alone: Any = copy.deepcopy(net)
        with torch.no_grad():
            alone.get_submodule(f"trunk.1.{layer}").weight.zero_()
            if layer != "bn2":
                alone.get_submodule("trunk.1.bn2").weight.zero_()
        assert torch.equal(out[t], alone(x)[t])
        assert out[t].std() > 0


# Normalisation ------------------------------------------------------------------------------------------------------


class OneNorm(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)
        self.n1, self.n2 = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
        self.heads = nn.ModuleDict({t: nn.Linear(48, 2) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.n1(self.c1(x))
        y = torch.relu(self.n2(self.c2(y))).flatten(1)
        return {t: h(y) for t, h in self.heads.items()}


class ByHand(nn.Module):
    """`OneNorm` with c2 split, written out; `own` statistics of n2 per task, or shared ones updated task after task."""

    def __init__(self, net: OneNorm, *, own: bool) -> None:
        super().__init__()
        self.c1, self.n1, self.heads = net.c1, net.n1, net.heads
        self.c2 = nn.ModuleDict({t: copy.deepcopy(net.c2) for t in TASKS})
        self.n2 = nn.ModuleDict({t: copy.deepcopy(net.n2) if own else net.n2 for t in TASKS})
        for t in TASKS:
            cast(Any, self.n2[t]).weight, cast(Any, self.n2[t]).bias = net.n2.weight, net.n2.bias

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.n1(self.c1(x))
        return {t: self.heads[t](torch.relu(self.n2[t](self.c2[t](y))).flatten(1)) for t in TASKS}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm_stats", ["per-task", "shared"])
def test_running_statistics_follow_a_hand_written_network(norm_stats: str, momentum: float | None) -> None:
    torch.manual_seed(0)
    net = OneNorm(momentum).double()
    model = split(net, plan("c2"), norm_stats=norm_stats)
    hand = ByHand(copy.deepcopy(net), own=norm_stats == "per-task")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, hand)]
    for _ in range(5):
        x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
        for m, optimizer in zip((model, hand), optimizers, strict=True):
            optimizer.zero_grad()
            out = m(x)
            torch.stack([(i + 1) * out[t].square().mean() for i, t in enumerate(TASKS)]).sum().backward()
            optimizer.step()
    norm = cast(Any, model).n2
    for t in TASKS:
        mine = norm.per_task[t] if norm_stats == "per-task" else norm
        theirs = cast(Any, hand.n2[t])
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(mine, key), getattr(theirs, key), rtol=1e-10, atol=1e-12)
    assert int(cast(Any, model).n1.num_batches_tracked) == 5
    assert hasattr(norm, "per_task") == (norm_stats == "per-task")
    for m in (model, hand):
        m.eval()
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    for t in TASKS:
        torch.testing.assert_close(model(x)[t], hand(x)[t], rtol=1e-10, atol=1e-12)


# What runs how often ------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return cast(Tensor, self.linear(x))


def counter() -> type[Counter]:
    return type("Counted", (Counter,), {"calls": 0})


def test_before_the_split_once_after_it_once_per_group_heads_once_each() -> None:
    before, after, head = counter(), counter(), counter()
    tasks = [f"t{i}" for i in range(40)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.split, self.after = before(), nn.Linear(4, 4), after()
            self.heads = nn.ModuleDict({t: nn.Sequential(head(), nn.Linear(4, 1)) for t in tasks})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.after(self.split(self.before(x)))
            return {t: h(y) for t, h in self.heads.items()}

    x = torch.randn(2, 4)
    groups = [tasks[:10], tasks[10:25], tasks[25:]]
    model = split(Net(), Plan(tasks=tasks, layers={"split": groups}), sample=x, atomic=["after"])
    before.calls = after.calls = head.calls = 0
    model(x)
    assert (before.calls, after.calls, head.calls) == (1, 3, 40)


def test_blocks_called_once_per_task_run_once_per_task() -> None:
    check_attention(TASKS)


@pytest.mark.timeout(120)
def test_forty_tasks_call_shared_blocks_forty_times() -> None:
    check_attention(tuple(f"t{i}" for i in range(40)))


def check_attention(tasks: tuple[str, ...]) -> None:
    """MTAN in small: attention per task on a shared stem, then through shared blocks."""
    block, head = counter(), counter()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shared, self.norm = nn.Linear(4, 4), block(), nn.BatchNorm1d(4)
            self.masks = nn.ModuleDict({t: nn.Linear(4, 4) for t in tasks})
            self.heads = nn.ModuleDict({t: nn.Sequential(head(), nn.Linear(4, 1)) for t in tasks})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.stem(x)
            out = {}
            for t in tasks:
                own = torch.sigmoid(self.masks[t](y)) * y
                out[t] = self.heads[t](self.norm(self.shared(own)))
            return out

    torch.manual_seed(0)
    net, x = Attention(), torch.randn(5, 4)
    expected = independent(net, x, tasks)
    for layer, atomic in (("stem", ["shared"]), ("shared.linear", []), ("norm", ["shared"])):
        model = split(net, plan(layer, tasks=tasks), atomic=atomic, sample=x if len(tasks) < 10 else None)
        model.eval()(x)
        model.train()(x)  # the first call in a mode is rehearsed
        block.calls = head.calls = 0
        out = model(x)
        assert (block.calls, head.calls) == (len(tasks), len(tasks))
        for t in tasks:
            assert torch.equal(out[t], expected[t])
        norm = cast(Any, model).norm
        assert [int(norm.per_task[t].num_batches_tracked) for t in tasks] == [2] * len(tasks)  # each its own statistics


def test_a_module_that_is_not_atomic_is_called_once_for_all_branches() -> None:
    after, tasks = counter(), tuple(f"t{i}" for i in range(40))
    calls: list[int] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.after, self.heads = nn.Linear(4, 4), after(), nn.ModuleDict()
            self.after.linear.register_forward_hook(lambda *_: calls.append(1))
            self.heads.update({t: nn.Linear(4, 1) for t in tasks})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.after(self.split(x))
            return {t: h(y) for t, h in self.heads.items()}

    x = torch.randn(2, 4)
    for layer, expected in (("split", (1, 1)), ("after.linear", (1, 40))):
        model = split(Net(), plan(layer, tasks=tasks), sample=x)
        after.calls, calls[:] = 0, []
        model(x)
        assert (after.calls, len(calls)) == expected


# Groups -------------------------------------------------------------------------------------------------------------


def test_groups_refine_downstream_and_are_layers(net: nn.Module, x: Tensor) -> None:
    layers = {"trunk.0.conv2": [["a", "b"], ["c"]], "trunk.1.conv1": [["a"], ["b", "c"]]}
    model = split(net, Plan(tasks=TASKS, layers=layers), sample=x)
    names = [layer.name for layer in find_layers(model)]
    assert {"trunk.0.conv2[a+b]", "trunk.0.conv2[c]", "trunk.1.conv1[a]", "trunk.1.conv1[b+c]"} <= set(names)
    keys = model.state_dict().keys()
    assert "trunk.0.bn2.per_task.a+b.running_mean" in keys
    assert "trunk.1.bn1.per_task.b.running_mean" in keys
    assert "trunk.0.bn1.running_mean" in keys
    perturb(model)
    verify(model, x)
    model(x)["a"].sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and "per_task" in n}
    assert reached == {"trunk.0.conv2.per_task.a+b.weight", "trunk.1.conv1.per_task.a.weight"}


# Nothing of the user's changes --------------------------------------------------------------------------------------


def test_the_original_is_untouched(net: nn.Module, x: Tensor) -> None:
    net(x)["a"].sum().backward()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    versions = [p._version for p in (*net.parameters(), *net.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    kinds = [(type(m), list(m.__dict__), len(m._forward_hooks)) for m in net.modules()]
    random = torch.get_rng_state()
    split(net, plan("trunk.0.conv2"), sample=x, init="fresh")(x)
    assert torch.equal(random, torch.get_rng_state())
    assert [p._version for p in (*net.parameters(), *net.buffers())] == versions
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert kinds == [(type(m), list(m.__dict__), len(m._forward_hooks)) for m in net.modules()]
    for p, g in zip(net.parameters(), grads, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(cast(Tensor, p.grad), g)
        assert not vars(p)


def test_the_split_model_is_still_the_users_class(net: nn.Module) -> None:
    cast(Any, net).note = {"kept": 1}
    model = cast(Any, split(net, plan("trunk.0.conv2")))
    conv = model.trunk[0].conv2
    assert isinstance(model, Headed)
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.shape == (4, 4, 3, 3)
    assert model.note == {"kept": 1}
    assert list(model.heads) == list(TASKS)
    assert "Conv2d" in repr(model)


# State --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("called", [False, True])
def test_copies_and_pickles_go_on_alone(net: nn.Module, x: Tensor, how: str, called: bool) -> None:
    model = split(net, plan("trunk.0.bn1", "trunk.1.conv1"))
    perturb(model)
    if called:
        model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    expected, out = model(x), twin(x)
    assert all(torch.equal(expected[t], out[t]) for t in TASKS)
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in twin.named_buffers()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.eval(), twin.eval()
    assert not torch.equal(model(x)["a"], twin(x)["a"])


def test_a_state_dict_loads_without_the_plan_and_before_the_first_call(net: nn.Module, x: Tensor) -> None:
    model = split(net, plan("trunk.0.bn1", "trunk.1.conv1"))
    model(x)
    perturb(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(9)
    twin = split(residual(TASKS), saved_plan(state))
    twin.load_state_dict(state)
    for m in (model, twin):
        m.eval()
    assert all(torch.equal(model(x)[t], twin(x)[t]) for t in TASKS)
    assert state.keys() == twin.state_dict().keys()


def test_names_that_are_prefixes_of_each_other(x: Tensor) -> None:
    tasks = ("t", "t1", "t11", "1")
    net = residual(tasks)
    model = split(
        net,
        Plan(tasks=tasks, layers={"trunk.0.conv1": [["t", "t11"], ["t1"], ["1"]], "trunk.1.bn1": [[t] for t in tasks]}),
    )
    model(x)
    perturb(model)
    twin = split(residual(tasks), saved_plan(model))
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        m.eval()
    assert all(torch.equal(model(x)[t], twin(x)[t]) for t in tasks)


def test_another_plans_state_is_refused_by_name(net: nn.Module) -> None:
    state = split(net, plan("trunk.1.conv1")).state_dict()
    with pytest.raises(SplitError, match=r"trunk\.1\.conv1"):
        split(net, plan("trunk.0.conv1")).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_shared_checkpoint_loads_into_every_copy(net: nn.Module, x: Tensor, assign: bool) -> None:
    torch.manual_seed(5)
    trained = residual(TASKS)
    trained(x)
    model = split(net, plan("trunk.0.bn1", "trunk.1.conv1"), sample=x)
    model.load_state_dict(trained.state_dict(), assign=assign)
    copies = [p for n, p in model.named_parameters() if "per_task" in n]
    assert len({p.data_ptr() for p in copies}) == len(copies)
    model.eval(), trained.eval()
    assert all(torch.equal(model(x)[t], trained(x)[t]) for t in TASKS)
    report = load_shared(model, trained.state_dict())
    assert report["trunk.1.conv1.weight"] == [f"trunk.1.conv1.per_task.{t}.weight" for t in TASKS]
    state = trained.state_dict()
    del state["trunk.1.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"trunk\.1\.conv1\.per_task\.a\.weight"):
        model.load_state_dict(state)


def test_dtype_device_and_functional_call(net: nn.Module, x: Tensor) -> None:
    model = split(net, plan("trunk.0.bn1", "trunk.1.conv1"), sample=x)
    reference = {t: o.double() for t, o in model(x).items()}
    out = model.double()(x.double())
    for t in TASKS:
        assert out[t].dtype == torch.float64
        torch.testing.assert_close(out[t], reference[t], rtol=1e-3, atol=1e-4)
    tensors = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    called = torch.func.functional_call(model, tensors, (x.double(),))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(tensors[n])
    assert all(torch.equal(called[t], model(x.double())[t]) for t in TASKS)
    assert all(p.is_meta for p in copy.deepcopy(model).to("meta").parameters())


# Views --------------------------------------------------------------------------------------------------------------


def test_a_view_is_the_original_network_with_shared_tensors(net: nn.Module, x: Tensor) -> None:
    model = split(net, plan("trunk.0.bn1", "trunk.1.conv1"), sample=x)
    perturb(model)
    names = {type(m) for m in net.modules()}
    out = model.eval()(x)
    for t in TASKS:
        one = view(model, t)
        assert {type(m) for m in one.module.modules()} <= names
        assert list(one.module.state_dict()) == list(net.state_dict())
        assert list(one(x)) == [t]
        assert torch.equal(one(x)[t], out[t])
        mine = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
        assert {id(p) for p in one.parameters()} | {id(b) for b in one.buffers()} <= mine
    with pytest.raises(SplitError, match=r"Nearest|Known"):
        view(model, "d")


def test_a_view_of_an_unsplit_model(net: nn.Module, x: Tensor) -> None:
    one = view(net.eval(), "b")
    assert list(one(x)) == ["b"]
    assert torch.equal(one(x)["b"], net(x)["b"])
    assert next(one.parameters()) is next(net.parameters())
    with pytest.raises(SplitError, match="'d'"):
        view(net, "d")(x)


def test_a_trunk_alone(x: Tensor) -> None:
    trunk = nn.Sequential(Block(2, 4), Block(4, 4)).eval()
    model = split(trunk, plan("1.conv1"))
    out = model(x)
    assert list(out) == list(TASKS)
    assert all(torch.equal(out[t], trunk(x)) for t in TASKS)
    assert torch.equal(view(model, "a")(x), trunk(x))


@pytest.mark.parametrize("mode", ["branch", "loop"])
@pytest.mark.parametrize("leaf", [nn.Linear(6, 2), nn.GRU(6, 2)], ids=str)
def test_a_single_layer_is_a_model_too(leaf: nn.Module, mode: str) -> None:
    x = torch.randn(4, 6)
    model = split(leaf, plan("(root)"), mode=mode, sample=x)
    out = model(x)
    assert list(out) == list(TASKS)
    first = out["a"][0] if isinstance(out["a"], tuple) else out["a"]
    assert type(first) is Tensor
    assert {n.split(".")[1] for n in model.state_dict() if "." in n} == set(TASKS)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_nearest(net: nn.Module) -> None:
    with pytest.raises(LayerMatchError, match=r"trunk\.0\.conv1"):
        split(net, plan("trunk.0.cnv1"))
    for wrong in ({"init": "cpy"}, {"norm_stats": "per_task"}, {"mode": "loops"}):
        with pytest.raises(SplitError, match="expected one of"):
            split(net, plan("trunk.0.conv1"), **cast(Any, wrong))
    with pytest.raises(LayerMatchError, match="atomic"):
        split(net, plan("trunk.0.conv1"), atomic=["nothing"])


def test_a_layer_that_matters_to_no_output_is_refused(net: nn.Module, x: Tensor) -> None:
    cast(Any, net).unused = nn.Linear(2, 2)
    model = split(net, plan("unused", "trunk.0.conv1"))
    for _ in range(2):
        with pytest.raises(SplitError, match="unused"):
            model(x)
    with pytest.raises(SplitError, match="unused"):
        split(net, plan("unused"), sample=x)
    with pytest.raises(SplitError, match="'a' alone"):
        split(net, plan("heads.a"), sample=x)


class Tree(nn.Module):
    """A layer for all tasks, and one for a and b."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pair = nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 2) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.stem(x))
        z = torch.relu(self.pair(y))
        return {t: h(y if t == "c" else z) for t, h in self.heads.items()}


def test_a_copy_that_matters_to_no_output_is_refused_with_groups_that_do() -> None:
    net, x = Tree(), torch.randn(4, 6)
    model = split(net, plan("pair"))
    for _ in range(2):
        with pytest.raises(SplitError, match=r"copies for 'c' would learn nothing.*\[\['a', 'c'\], \['b'\]\]"):
            model(x)
    with pytest.raises(SplitError, match="share one copy"):
        split(net, Plan(tasks=TASKS, layers={"pair": [["a", "b"], ["c"]]}), sample=x)
    model = split(net, Plan(tasks=TASKS, layers={"stem": [["a"], ["b"], ["c"]], "pair": [["a", "c"], ["b"]]}), sample=x)
    torch.stack([o.square().sum() for o in model(x).values()]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
