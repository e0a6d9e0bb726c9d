"""Never silently wrong: each of these raises, names the place, and says what to do."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import split, verify
from zoo import TASKS, Double, Fused, Headed, Tied, linear_heads

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def plan(*layers: str) -> Plan:
    return Plan(tasks=TASKS, layers=layers)


class Step(nn.Module):
    """A split linear layer, then whatever `then` does with its output."""

    def __init__(self, then: Callable[["Step", Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.w = nn.Parameter(torch.ones(6))
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self, self.b(x), self.a(x))


def after_split(then: Callable[[Step, Tensor, Tensor], Any], **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Headed(Step(then), 6, TASKS)
    model = split(net, plan("trunk.a"), **options)
    with torch.no_grad():  # let the copies differ, as training does
        for i, t in enumerate(TASKS):
            cast(Any, model).trunk.a.per_task[t].weight.mul_(2.0 * i - 1)
    return net, model


def branch_on_value(_: Step, __: Tensor, y: Tensor) -> Tensor:
    return y * 2 if y.sum() > 0 else y


def item(_: Step, __: Tensor, y: Tensor) -> Tensor:
    return y * y.mean().item()


def numpy(_: Step, __: Tensor, y: Tensor) -> Tensor:
    return y + torch.from_numpy(y.detach().numpy())


def data_dependent_shape(_: Step, __: Tensor, y: Tensor) -> Tensor:
    return y[y > 0].sum() + torch.zeros(4, y[y > 0].shape[0]).sum(1, keepdim=True)


def add_into_shared(_: Step, s: Tensor, y: Tensor) -> Tensor:
    return s.add_(y)


def copy_into_shared(_: Step, s: Tensor, y: Tensor) -> Tensor:
    s[:, :3] = y[:, :3]
    return s


def out_argument(_: Step, s: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(s)
    torch.mul(y.detach(), 2, out=out)
    return out + y


def shared_memory(_: Step, s: Tensor, y: Tensor) -> Tensor:
    z = s.clone().expand_as(y)
    z += 1
    return z * y


def custom_function(step: Step, _: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, Double.apply(y, step.w)) + 1  # type: ignore[no-untyped-call]


def custom_function_last(step: Step, _: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, Double.apply(y, step.w))  # type: ignore[no-untyped-call]


def reentrant(step: Step, _: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, checkpoint(step.b, y, use_reentrant=True)) + 1


def vmapped(_: Step, __: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, torch.vmap(lambda v: v * 2)(y))


# Operators of C++ extensions: with an autograd formula, without one, and without a composite implementation -----------


@torch.library.custom_op("reconmtl_tests::scaled", mutates_args=())
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w


scaled.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),  # noqa: ARG005
)


@torch.library.custom_op("reconmtl_tests::accumulate", mutates_args=("into",))
def accumulate(x: Tensor, into: Tensor) -> None:
    into.add_(x)


LIBRARY = torch.library.Library("reconmtl_library", "DEF")
LIBRARY.define("scaled(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("scaled", lambda x, w: x * w, "CPU")
LIBRARY.define("raised(Tensor(a!) x, Tensor y) -> Tensor(a!)")
LIBRARY.impl("raised", lambda x, y: x.copy_(x + y), "CPU")


def custom_op(step: Step, _: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, scaled(y, step.w)) + 1


def library_op(step: Step, s: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.reconmtl_library.scaled(w=y.detach(), x=s.detach())) * y + step.w


def custom_op_in_place(_: Step, s: Tensor, y: Tensor) -> Tensor:
    into = y.detach().clone()
    accumulate(s.detach(), into)
    return into * y


def library_op_in_place(_: Step, s: Tensor, y: Tensor) -> Tensor:
    z = y.detach().clone()
    return cast(Tensor, torch.ops.reconmtl_library.raised.default(z, s.detach())) * y + z


@pytest.mark.parametrize("then", [custom_op, library_op, custom_op_in_place, library_op_in_place])
def test_operators_are_called_once_per_task(then: Any) -> None:
    _, model = after_split(then)
    _, whole = after_split(then, atomic=["trunk"])
    _, loop = after_split(then, mode="loop")
    outs, params = [m(X) for m in (model, whole, loop)], [list(m.parameters()) for m in (model, whole, loop)]
    for t in TASKS:
        grads = [
            torch.autograd.grad(out[t].square().sum(), mine, retain_graph=True, allow_unused=True)
            for out, mine in zip(outs, params, strict=True)
        ]
        for i in (1, 2):
            assert torch.equal(outs[0][t], outs[i][t])
            for a, b in zip(grads[0], grads[i], strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)
    assert not torch.equal(outs[0]["a"] - outs[0]["b"], torch.zeros(()))


def test_what_passes_by_python_is_refused_by_the_operator_name() -> None:
    """As a C++ extension does, which calls the dispatcher by itself."""

    def then(step: Step, _: Tensor, y: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return cast(Tensor, torch.ops.reconmtl_library.scaled(y, step.w))

    _, model = after_split(then)
    with pytest.raises(SplitError, match=r"^trunk \(Step\): reconmtl_library\.scaled\.default.*atomic=\["):
        model(X)
    _, whole = after_split(then, atomic=["trunk"])
    _, loop = after_split(then, mode="loop")
    assert all(torch.equal(whole(X)[t], loop(X)[t]) for t in TASKS)


def custom_op_into_shared(_: Step, s: Tensor, y: Tensor) -> Tensor:
    into = s.detach().clone()
    accumulate(y.detach(), into)
    return into * y


def library_op_into_shared(_: Step, s: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.reconmtl_library.raised(s.detach().clone(), y.detach())) * y


def overload_into_shared(_: Step, s: Tensor, y: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.aten.add_.Tensor(s.detach().clone(), y.detach())) * y


def kernel_into_shared(step: Step, _: Tensor, y: Tensor) -> Tensor:
    norm = cast(Any, step.norm)
    return torch.batch_norm(y, None, None, norm.running_mean, norm.running_var, True, 0.1, 1e-5, False)


def renormed_embedding(step: Step, _: Tensor, y: Tensor) -> Tensor:
    return nn.functional.embedding(y.argmax(1), step.b.weight.detach().clone(), max_norm=0.1) * y


def norm_as_function(step: Step, _: Tensor, y: Tensor) -> Tensor:
    return nn.functional.batch_norm(y, step.norm.running_mean, step.norm.running_var, training=True)


CASES = [
    (branch_on_value, "__bool__"),
    (item, "item"),
    (numpy, "numpy"),
    (add_into_shared, "add_"),
    (copy_into_shared, "__setitem__"),
    (out_argument, "mul"),
    (custom_function, "Double"),
    (custom_function_last, "Double"),
    (reentrant, "use_reentrant=False"),
    (vmapped, "vmap"),
    (norm_as_function, "batch_norm"),
    (custom_op_into_shared, "accumulate"),
    (library_op_into_shared, "raised"),
    (overload_into_shared, "add_"),
    (kernel_into_shared, "batch_norm"),
    (renormed_embedding, "embedding"),
]


@pytest.mark.parametrize(("then", "named"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_what_hides_the_task_is_refused_and_the_loop_computes_it(then: Any, named: str) -> None:
    _, model = after_split(then)
    with pytest.raises(SplitError, match=named) as caught:
        model(X)
    assert not isinstance(caught.value, TypeError)
    assert "mode='loop'" in str(caught.value) or "out of place" in str(caught.value)
    _, model = after_split(then, atomic=["trunk"]) if then is not numpy else after_split(then, mode="loop")
    if then in (out_argument, numpy):  # these cut the graph in every network
        return
    out = model(X)
    _, loop = after_split(then, mode="loop")
    assert all(torch.equal(out[t], loop(X)[t]) for t in TASKS)


def test_the_message_names_the_module() -> None:
    _, model = after_split(item)
    with pytest.raises(SplitError, match=r"^trunk \(Step\): item"):
        model(X)


def test_views_of_shared_memory_are_not_changed_in_place() -> None:
    def then(_: Step, s: Tensor, y: Tensor) -> Tensor:
        z = s.clone().reshape(4, 6).type_as(y)
        z = z.expand_as(y.unsqueeze(0))[0]
        z += 1
        return z * y

    _, model = after_split(then)
    with pytest.raises(SplitError, match="share memory"):
        model(X)


def test_an_in_place_leaf_on_a_shared_input_is_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((6,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(self.scale)

    net = Headed(nn.Sequential(nn.Linear(6, 6), InPlace()), 6, TASKS)
    with pytest.raises(SplitError, match=r"trunk\.1.*in place"):
        split(net, plan("trunk.1"))(X)
    split(net, plan("trunk.0"), sample=X)  # each branch changes its own


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "name": lambda u: u,
    "view": lambda u: u.view(-1, 6),
    "slice": lambda u: u[:, :],
    "same": lambda u: u.double() if u.dtype == torch.float64 else u.float(),
    "base": lambda u: u.reshape(2, 2, 6),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("alias", ALIASES)
def test_a_value_changed_under_one_name_is_not_used_under_another(alias: str, mode: str) -> None:
    """Whenever it happens, also where the first call shows nothing: in another mode, behind a gate that is zero."""

    def then(step: Step, s: Tensor, y: Tensor) -> Tensor:
        if step.training != (mode == "train"):
            return s + y
        u = s * 1
        keep = ALIASES[alias](u)
        if alias == "base":
            keep, u = u, keep
        u += (y * cast(Tensor, step.gate)).view_as(u)
        return u.view_as(y) + keep.view_as(y) * y

    torch.manual_seed(0)
    step = Step(then)
    step.gate = nn.Parameter(torch.zeros(6))
    net = Headed(step, 6, TASKS).train(mode == "eval")
    model = split(net, plan("trunk.a"))
    model(X)
    x = X.clone()
    for _ in range(2):
        with pytest.raises(SplitError, match=r"trunk \(Step\): .*`x = x \+ y`.*atomic=\["):
            model.train(mode == "train")(x)
    net.train(mode == "train")
    model = split(net, plan("trunk.a"), atomic=["trunk"])
    assert all(torch.equal(model(X)[t], net(X)[t]) for t in TASKS)


def test_the_users_input_is_the_users_again_after_the_call() -> None:
    def then(_: Step, s: Tensor, y: Tensor) -> Tensor:
        s += y
        return s

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.step = nn.Linear(6, 6), Step(then)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.step.then(self.step, x, self.a(x.clone())))

    torch.manual_seed(0)
    net = Headed(Residual(), 6, TASKS)
    model, x = split(net, plan("trunk.a")), X.clone()
    expected = net(X.clone())
    for _ in range(2):
        out = model(x)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)
        assert type(x) is Tensor
        assert torch.equal(x, X)
        assert not vars(x)


@pytest.mark.parametrize("target", ["shared", "buffer"])
def test_assigning_the_data_of_a_tensor_is_refused(target: str) -> None:
    def then(step: Step, s: Tensor, y: Tensor) -> Tensor:
        changed = s.clone() if target == "shared" else cast(Tensor, step.norm.running_mean)
        changed.data = y.detach().mean(0)
        return y + changed

    _, model = after_split(then)
    with pytest.raises(SplitError, match=r"trunk \(Step\): `x\.data = y`"):
        model(X)


class Mixing(nn.Module):
    """What one task computes is a constant to another: found only by computing, in a rehearsal."""

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.change = change
        self.a, self.b, self.heads = nn.Linear(6, 6), nn.Linear(6, 6), linear_heads(6, TASKS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.change(x, self.b(x.detach().clone()))
        out = {t: h(self.a(x)) for t, h in self.heads.items()}
        return {t: o + out["a"].detach() for t, o in out.items()}


def test_an_input_is_changed_in_place_once_although_the_first_call_is_rehearsed() -> None:
    torch.manual_seed(0)
    net = Mixing(lambda x, _: x.mul_(2))
    model = split(net, plan("a"))
    mine, theirs = X.clone(), X.clone()
    out, expected = model(mine), net(theirs)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    assert torch.equal(mine, theirs)


def test_an_input_becomes_part_of_the_graph_once() -> None:
    torch.manual_seed(0)
    net = Mixing(lambda x, y: x.add_(y))
    model = split(net, plan("a"))
    out, expected = model(X.clone()), net(X.clone())
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    assert torch.autograd.grad(out["b"].sum(), list(model.parameters()), allow_unused=True)


def test_values_that_pass_from_head_to_head_through_an_attribute_are_not_taken_for_shared() -> None:
    class Noted(nn.Module):
        def __init__(self, notes: dict[str, Tensor]) -> None:
            super().__init__()
            self.linear, self.notes = nn.Linear(6, 2), notes

        def forward(self, x: Tensor) -> Tensor:
            seen = sum(self.notes.values(), torch.zeros(()))
            out = self.linear(x)
            self.notes[str(len(self.notes))] = out.detach()
            return cast(Tensor, out + seen)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, notes = nn.Linear(6, 6), cast(dict[str, Tensor], {})
            self.notes, self.heads = notes, nn.ModuleDict({t: Noted(notes) for t in TASKS})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.notes.clear()
            y = self.trunk(x)
            return {t: h(y) for t, h in self.heads.items()}

    net = Net()
    model = split(net, plan("trunk"), sample=X)  # computes every head for every task: nothing can be pruned here
    assert all(torch.equal(model(X)[t], net(X)[t]) for t in TASKS)


def test_what_a_whole_module_appends_to_a_list_is_kept_per_task() -> None:
    class Listing(nn.Module):
        def __init__(self, losses: list[Tensor]) -> None:
            super().__init__()
            self.weight, self.losses = nn.Parameter(torch.ones(6)), losses

        def forward(self, x: Tensor) -> Tensor:
            self.losses.append((x * self.weight).square().mean())
            return x * self.weight

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[Tensor] = []
            self.stem, self.a, self.b = nn.Linear(6, 6), Listing(self.losses), Listing(self.losses)
            self.heads = linear_heads(6, TASKS)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.losses.clear()
            y = self.b(self.a(self.stem(x)))
            return {t: h(y) + torch.stack(self.losses).sum() for t, h in self.heads.items()}

    net = Net()
    for layer, options in [("stem", {}), ("a", {}), ("b", {}), ("a", {"mode": "loop"}), ("b", {"atomic": ["(root)"]})]:
        model = split(net, plan(layer), sample=X, **cast(Any, options))
        assert all(torch.equal(model(X)[t], net(X)[t]) for t in TASKS)


NOTES: list[Tensor] = []


class Noting(nn.Module):
    """Leaves a value in a place that nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        NOTES[:] = [(x * self.weight).detach()]
        return x


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + NOTES[0]


def test_verify_finds_what_passes_between_tasks_through_a_global() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), Noting(), Reading()), 6, TASKS)
    with pytest.raises(SplitError, match="output differs"):
        split(net, plan("trunk.0"), sample=X)
    split(net, plan("trunk.0"), sample=X, atomic=["trunk"])


# Before any change --------------------------------------------------------------------------------------------------


def test_tied_weights_are_split_together_or_not_at_all() -> None:
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    net = Headed(Tied(), 35, TASKS)
    for one in ("trunk.embed", "trunk.out"):
        with pytest.raises(SplitError, match=r"trunk\.embed.*trunk\.out"):
            split(net, plan(one))
    groups = [["a", "b"], ["c"]]
    with pytest.raises(SplitError, match="differently"):
        split(net, Plan(tasks=TASKS, layers={"trunk.embed": groups, "trunk.out": [["a"], ["b"], ["c"]]}))
    model = cast(Any, split(net, plan("trunk.embed", "trunk.out"), sample=tokens))
    for t in TASKS:
        assert model.trunk.embed.per_task[t].weight is model.trunk.out.per_task[t].weight
    twin = copy.deepcopy(model)
    assert twin.trunk.embed.per_task["a"].weight is twin.trunk.out.per_task["a"].weight
    assert sum(1 for n, _ in model.named_parameters() if "embed" in n or ".out." in n) == 3


@pytest.mark.parametrize("where", ["attribute", "list", "dict"])
def test_a_parameter_held_elsewhere_is_refused(where: str) -> None:
    net = Headed(nn.Linear(6, 6), 6, TASKS)
    weight = cast(Any, net.trunk).weight
    held = {"attribute": weight, "list": [weight], "dict": {"w": (weight,)}}[where]
    net.__dict__["held"] = held
    with pytest.raises(SplitError, match=r"trunk\.weight.*held"):
        split(net, plan("trunk"))
    net.__dict__["held"] = None
    split(net, plan("trunk"))


def test_models_that_are_no_plain_modules_are_refused() -> None:
    lazy = Headed(nn.LazyLinear(6), 6, TASKS)
    with pytest.raises(SplitError, match="Call the model once"):
        split(lazy, plan("trunk"))
    lazy(X)
    split(lazy, plan("trunk"), sample=X)
    loaded = Headed(nn.LazyLinear(6), 6, TASKS)
    loaded.load_state_dict(lazy.state_dict())
    with pytest.raises(SplitError, match="has its shapes"):
        split(loaded, plan("trunk"))
    net = Headed(nn.Linear(6, 6), 6, TASKS)
    with pytest.raises(SplitError, match="DataParallel"):
        split(nn.DataParallel(net), plan("trunk"))
    with pytest.raises(SplitError, match=r"torch\.compile"):
        split(cast(nn.Module, torch.compile(net, backend="eager")), plan("trunk"))
    with pytest.raises(SplitError, match="split model already"):
        split(split(net, plan("trunk")), plan("trunk"))
    with pytest.raises(SplitError, match=r"nn\.Module"):
        split(cast(Any, lambda x: x), plan("trunk"))
    with pytest.raises(SplitError, match="Plan"):
        split(net, cast(Any, ["trunk"]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is not supported:DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    with pytest.raises(SplitError, match=r"torch\.jit"):
        split(torch.jit.script(nn.Sequential(nn.Linear(6, 6))), plan("0"))
    inner = Headed(nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6))), 6, TASKS)
    with pytest.raises(SplitError, match=r"trunk\.1"):
        split(inner, plan("trunk.1"))
    model = split(inner, plan("trunk.0"), sample=X)  # calling one with branched values works
    with pytest.raises(SplitError, match=r"rm\.view"):
        torch.jit.script(model)


def test_a_reserved_name_is_refused() -> None:
    net = Headed(nn.Linear(6, 6), 6, TASKS)
    net.trunk.__dict__["per_task"] = None
    with pytest.raises(SplitError, match="per_task"):
        split(net, plan("trunk"))


def test_outputs_must_name_all_tasks() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.heads = nn.Linear(6, 6), linear_heads(6, ["a", "d"])

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {t: h(self.a(x)) for t, h in self.heads.items()}

    with pytest.raises(SplitError, match=r"none for \['b', 'c'\]"):
        split(Partial(), plan("a"), sample=X)


def test_fresh_copies_need_a_reset() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 6), Fused()), 6, TASKS)
    with pytest.raises(SplitError, match="reset_parameters"):
        split(net, plan("trunk.1"), init="fresh")
    torch.manual_seed(0)
    model = cast(Any, split(net, plan("trunk.0"), init="fresh", sample=X))
    weights = [model.trunk[0].per_task[t].weight for t in TASKS]
    assert not any(torch.equal(a, b) for a, b in ((weights[0], weights[1]), (weights[1], weights[2])))
    assert not any(torch.equal(w, cast(Any, net.trunk)[0].weight) for w in weights)
    torch.manual_seed(0)
    again = cast(Any, split(net, plan("trunk.0"), init="fresh"))
    assert all(torch.equal(again.trunk[0].per_task[t].weight, w) for t, w in zip(TASKS, weights, strict=True))


def test_a_value_that_passes_between_tasks_later_is_not_pruned_silently() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.heads, self.mix = nn.Linear(6, 6), linear_heads(6, TASKS), False

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = {t: h(self.a(x)) for t, h in self.heads.items()}
            return {**out, "b": out["b"] + out["a"].detach()} if self.mix else out

    torch.manual_seed(0)
    net = Late()
    model = split(net, plan("a"), sample=X)
    cast(Any, model).mix = net.mix = True
    with pytest.raises(SplitError, match="call the model again"):
        model(X)
    assert all(torch.equal(model(X)[t], net(X)[t]) for t in TASKS)
    verify(model, X)


def test_split_tensors_cannot_be_replaced_by_something_else() -> None:
    model = cast(Any, split(Headed(nn.Linear(6, 6), 6, TASKS), plan("trunk"), sample=X))
    with pytest.raises(SplitError, match="per_task"):
        model.trunk.weight = torch.ones(6, 6)
    model.trunk.weight = nn.Parameter(torch.eye(6))
    copies = [model.trunk.per_task[t].weight for t in TASKS]
    assert len({p.data_ptr() for p in copies}) == 3
    assert all(torch.equal(p, torch.eye(6)) for p in copies)
    nn.init.normal_(model.trunk.weight)
    assert not torch.equal(copies[0], copies[1])
