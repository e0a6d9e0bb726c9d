import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import permutations
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reconmtl as rm
from oracles import task_gradients
from reconmtl import passes
from reconmtl.balance import Balancer
from reconmtl.balancers import BALANCERS
from reconmtl.errors import ProbeError, ProblemError, RunError
from reconmtl.gram import Gradients
from reconmtl.networks import resnet
from reconmtl.probing import Probe
from reconmtl.rules import Rule

minimize, root = pytest.importorskip("scipy.optimize").minimize, pytest.importorskip("scipy.optimize").root
aggregation = pytest.importorskip("torchjd.aggregation")

TASKS = ("a", "b", "c", "d")
STATEFUL = ("gradvac", "pcd", "excess-mtl", "gradnorm", "db-mtl", "uw", "dwa", "imtl-l", "famo")
ELEMENTWISE = ("graddrop", "config", "trimmed-mean", "excess-mtl", "db-mtl")
LOSSES_ALONE = ("uw", "dwa", "imtl-l", "famo", "stch", "geometric-mean", "rlw")
WHOLE_LOSSES = (*LOSSES_ALONE, "gradnorm")


class Net(nn.Module):
    """A trunk for all, a branch that two tasks share, heads; the losses are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.body = nn.Linear(6, 6)
        self.pair = nn.Linear(6, 6)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 2) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.body(torch.relu(self.stem(x))))
        y = torch.tanh(self.pair(z))
        return {t: head(y if t in ("a", "b") else z) for t, head in self.heads.items()}


def network(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def losses(model: nn.Module, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    x, y = torch.randn(8, 5, generator=draw).to(like), torch.randn(8, len(TASKS), 2, generator=draw).to(like)
    out = model(x)
    return {t: (out[t] - (i + 1) * y[:, i]).pow(2).mean() + 0.1 for i, t in enumerate(TASKS) if t in tasks}


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def balanced(spec: object, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    Probe(model, balancer=Balancer(spec, TASKS), **options).backward(losses(model))
    return grads(model)


# Every method's step, written out by hand. ----------------------------------------------------------------------------


def _shortest(rows: Tensor) -> Tensor:
    """The minimum over every face of the hull, one by one."""
    best = None
    for bits in range(1, 2 ** len(rows)):
        chosen = rows[[i for i in range(len(rows)) if bits >> i & 1]]
        n = len(chosen)
        system = torch.zeros(n + 1, n + 1, dtype=rows.dtype)
        system[:n, :n], system[:n, n], system[n, :n] = chosen @ chosen.T, 1, 1
        w = torch.linalg.solve(system, torch.eye(n + 1, dtype=rows.dtype)[n])[:n]
        if bool((w >= -1e-12).all()) and (best is None or (w @ chosen).norm() < best.norm()):
            best = w @ chosen
    assert best is not None
    return cast(Tensor, best * len(rows))


def _projected(rows: Tensor) -> Tensor:
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        own = row.clone()
        for j in torch.randperm(len(rows)).tolist():
            if j != i and own @ rows[j] < 0:
                own -= own @ rows[j] / (rows[j] @ rows[j]) * rows[j]
        total += own
    return total


def _dropped(rows: Tensor) -> Tensor:
    drawn = torch.rand(rows.shape[1], dtype=torch.float32)
    total = torch.zeros_like(rows[0])
    for k in range(rows.shape[1]):
        share = 0.5 * (1 + rows[:, k].sum() / rows[:, k].abs().sum())
        for g in rows[:, k]:
            total[k] += g if (share > drawn[k]) == (g > 0) else 0
    return total


def _averse(rows: Tensor, c: float = 0.4) -> Tensor:
    mean, count = rows.mean(0), len(rows)
    size = rows.norm()

    def value(w: Any) -> float:
        vector = torch.as_tensor(w) @ rows / size
        return float(vector @ mean / size + c * mean.norm() / size * vector.norm())

    unity = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(
        value, [1 / count] * count, bounds=[(0, 1)] * count, constraints=unity, options={"ftol": 1e-16, "maxiter": 500}
    )
    vector = torch.as_tensor(found.x) @ rows
    return cast(Tensor, count * (mean + c * mean.norm() / vector.norm() * vector) / (1 + c * c))


def _bargained(rows: Tensor) -> Tensor:
    """The root of G w = 1 / w, in logarithms, for a Gram matrix of norm one."""
    gram = (rows @ rows.T / (rows @ rows.T).norm()).numpy()
    found = root(lambda x: gram @ np.exp(x) * np.exp(x) - 1, np.zeros(len(rows)), method="lm", tol=1e-14)
    assert found.success
    return torch.from_numpy(np.exp(found.x)) @ rows


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "joint": (lambda rows: rows.sum(0), 1e-12),
    "mgda": (_shortest, 1e-9),
    "pcgrad": (_projected, 1e-10),
    "graddrop": (_dropped, 1e-10),
    "cagrad:c=0.4": (_averse, 1e-4),
    "aligned-mtl": (lambda rows: aggregation.AlignedMTL()(rows) * 4, 1e-9),
    "imtl-g": (lambda rows: aggregation.IMTLG()(rows) * 4, 1e-9),
    "upgrad": (lambda rows: aggregation.UPGrad()(rows) * 4, 1e-9),
    "dualproj": (lambda rows: aggregation.DualProj()(rows) * 4, 1e-9),
    "config": (lambda rows: aggregation.ConFIG()(rows), 1e-9),
    "gradvac": (lambda rows: aggregation.GradVac()(rows), 1e-6),
    "krum": (lambda rows: aggregation.Krum(n_byzantine=0)(rows) * 4, 1e-9),
    "trimmed-mean": (lambda rows: aggregation.TrimmedMean(trim_number=1)(rows) * 4, 1e-9),
    "rgw": (lambda rows: aggregation.Random()(rows) * 4, 1e-9),
    "fairgrad": (lambda rows: aggregation.FairGrad(alpha=1.0, max_iters=500)(rows), 1e-3),
    "nash-mtl:max_norm=0": (_bargained, 1e-6),
    "pcd": (lambda rows: aggregation.PCD()(rows), 1e-9),
    "excess-mtl": (lambda rows: aggregation.ExcessMTL(robust_step_size=1.0)(rows) * 4, 1e-9),
}


@pytest.mark.parametrize("plan", [None, "pairs"])
@pytest.mark.parametrize("spec", STEPS)
def test_a_step_is_the_one_written_by_hand(spec: str, plan: str | None) -> None:
    """Shared parameters, and copies for groups, are one vector; everything else gets its own task's gradient."""
    model: nn.Module = network()
    if plan is not None:
        groups = [["a", "c"], ["b"], ["d"]]
        x = torch.randn(3, 5, dtype=torch.float64)
        model = rm.split(model, rm.Plan(tasks=TASKS, layers={"body": groups}), sample=x)
    step, tolerance = STEPS[spec]
    found = balanced(spec, model)
    parameters = dict(model.named_parameters())
    per_task = task_gradients(losses(model), list(parameters.values()))
    reach = {n: [i for i in range(4) if bool(per_task[i][k].any())] for k, n in enumerate(parameters)}
    shared = [k for k, n in enumerate(parameters) if len(reach[n]) > 1]
    assert (len(shared) > 5) == (plan is not None) or plan is None
    rows = torch.stack([torch.cat([per_task[i][k].flatten() for k in shared]) for i in range(4)])
    torch.manual_seed(7)
    expected = step(rows)
    got = torch.cat([found[list(parameters)[k]].flatten() for k in shared])
    assert (got - expected).norm() <= tolerance * expected.norm()
    for k, name in enumerate(parameters):
        if len(reach[name]) == 1:
            torch.testing.assert_close(found[name], per_task[reach[name][0]][k])


@pytest.mark.parametrize("spec", sorted(set(BALANCERS) - {"joint"}))
def test_more_passes_instead_of_memory_change_nothing(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    expected = balanced(spec, model)
    monkeypatch.setattr(passes, "KEEP", 0)
    monkeypatch.setitem(cast(Any, Gradients.__init__).__kwdefaults__, "memory", 0)
    for options in ({}, {"start": 5}, {"engine": "delta"}):
        for name, grad in balanced(spec, model, **cast(Any, options)).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-10)


# Properties. ----------------------------------------------------------------------------------------------------------

RANDOM = ("rgw", "rlw")  # which task gets which number is drawn, so that permuted tasks get other ones
DRAWS_AN_ORDER = ("pcgrad", "gradvac")  # beyond two tasks
LEADS = ("pcd",)  # its first task is not like the others


def drawn_rows(seed: int, tasks: int = 4) -> Tensor:
    return torch.randn(tasks, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(spec: str, rows: Tensor, values: Tensor) -> Tensor:
    """The update that a balancer makes of gradients in its first step; of losses alone, their weights."""
    torch.manual_seed(7)
    balancer = Balancer(spec, TASKS[: len(rows)])
    if balancer.rule.takes == "rows":
        return balancer.rule.update(rows.clone(), values)
    if balancer.rule.takes == "losses":
        return balancer.rule.weights(torch.zeros(0, 0), values)
    return balancer.weights(rows @ rows.T, values) @ rows


@pytest.mark.parametrize("spec", sorted(set(BALANCERS) - {*RANDOM, *LEADS}))
def test_the_order_of_tasks_does_not_matter(spec: str) -> None:
    for seed in range(5):
        rows = drawn_rows(seed, 2 if spec in DRAWS_AN_ORDER else 4 if spec == "krum" else 3)  # of 3, two tie in Krum
        values = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
        expected = outcome(spec, rows, values)
        for order in permutations(range(len(rows))):
            at = torch.tensor(order)
            found = outcome(spec, rows[at], values[at])
            same = expected[at] if Balancer(spec, TASKS[:3]).rule.takes == "losses" else expected
            torch.testing.assert_close(found, same, rtol=1e-6, atol=1e-6)


DEGREES = {  # an update of gradients k times as large is k^degree times as large
    **dict.fromkeys(BALANCERS, 1.0),
    "nash-mtl:max_norm=0": 1.0,  # its Gram matrix is brought to norm one
    "fairgrad": 0.0,  # weights solve G w = 1 / w
    "fairgrad:alpha=2": -1 / 3,
}


@pytest.mark.parametrize("power", [-7, -3, 3, 7])
@pytest.mark.parametrize("spec", sorted(set(DEGREES) - {"nash-mtl", "pcd", "excess-mtl", *LOSSES_ALONE}))
def test_small_and_large_gradients_get_the_same_direction(spec: str, power: int) -> None:
    """A bound on gradients' sizes would show within 1e-7 to 1e7; PCD and ExcessMTL have such bounds by definition."""
    rows, values = drawn_rows(1), torch.ones(4, dtype=torch.float64)
    expected = outcome(spec, rows, values)
    found = outcome(spec, rows * 10.0**power, values)
    scale = (10.0**power) ** DEGREES[spec]
    torch.testing.assert_close(found / scale, expected, rtol=1e-6, atol=1e-9)


AS_IT_IS = ("joint", "pcgrad", "graddrop", "gradvac", "upgrad", "dualproj")


@pytest.mark.parametrize("spec", AS_IT_IS)
def test_without_a_conflict_these_leave_the_sum(spec: str) -> None:
    for seed in range(5):
        rows = drawn_rows(seed).abs()
        torch.testing.assert_close(outcome(spec, rows, torch.ones(4)), rows.sum(0), rtol=1e-6, atol=1e-9)


AGREEING = {
    **dict.fromkeys([*AS_IT_IS, "mgda", "imtl-g", "config", "trimmed-mean", "krum", "gradnorm", "excess-mtl"], 1.0),
    "cagrad:c=0.4": 1.4 / 1.16,  # (1 + c) / (1 + c^2), as its ball is around the mean
}


@pytest.mark.parametrize("spec", sorted(AGREEING))
def test_tasks_that_agree_get_the_sum(spec: str) -> None:
    rows = drawn_rows(0, 1).expand(3, -1)
    found = outcome(spec, rows, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found, AGREEING[spec] * rows.sum(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", ["mgda", "upgrad", "dualproj", "config", "nash-mtl", "fairgrad", "cagrad:c=0.9999"])
def test_these_updates_harm_no_task(spec: str) -> None:
    """Nor does PCGrad's with two tasks, nor CAGrad's once its ball reaches as far as the mean gradient."""
    for seed in range(20):
        rows = drawn_rows(seed)
        update = outcome(spec, rows, torch.ones(4))
        assert float((rows @ update / rows.norm(dim=1) / update.norm()).min()) > -1e-3
    pair = drawn_rows(3, 2)
    assert float((pair @ outcome("pcgrad", pair, torch.ones(2))).min()) >= -1e-12


class Work(TorchDispatchMode):
    """Counts elements that operations read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("spec", sorted(n for n, m in BALANCERS.items() if Balancer(n, TASKS).rule.takes == "gram"))
def test_balancing_by_a_gram_matrix_adds_nothing_to_what_measuring_does(
    spec: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many backward passes, or fewer where measuring goes in stages, and the same elements up to two per cent."""
    model, x = resnet.multifashion(width=8, tasks=TASKS), torch.rand(4, 1, 36, 36)
    monkeypatch.setitem(cast(Any, Gradients.__init__).__kwdefaults__, "memory", memory)
    found = []
    for balancer in (None, Balancer(spec, TASKS)):
        probe, passes_run = Probe(model, balancer=balancer), 0
        grad = torch.autograd.grad

        def counted(*args: Any, grad: Any = grad, **kwargs: Any) -> Any:
            nonlocal passes_run
            passes_run += 1
            return grad(*args, **kwargs)

        for step in range(2):  # in the first one engines are compared
            model.zero_grad()
            values = {t: out.square().mean() for t, out in model(x).items()}
            with monkeypatch.context() as patched, Work() if step else nullcontext() as work:
                patched.setattr(torch.autograd, "grad", counted)
                passes_run = 0
                probe.backward(values)
        found.append((passes_run, cast(Work, work).elements))
    assert found[1][0] <= found[0][0]
    assert found[1][1] <= 1.02 * found[0][1]


# Losses, states, steps that lack something. ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*sorted(set(WHOLE_LOSSES) - {"gradnorm"})])
def test_a_weighted_loss_is_that_everywhere(spec: str) -> None:
    """Heads too get the gradient of the scalarized loss, measured or not; a learned weight gets its own."""
    model = network()
    for options in ({}, {"start": 9}):
        balancer = Balancer(spec, TASKS)
        model.zero_grad()
        torch.manual_seed(7)
        Probe(model, balancer=balancer, **cast(Any, options)).backward(losses(model))
        found, learned = grads(model), [p.grad for p in balancer.parameters()]
        model.zero_grad()
        torch.manual_seed(7)
        other = cast(Any, Balancer(spec, TASKS).rule)
        values = torch.stack(list(losses(model).values()))
        (other.module.double()(values) * (4 if other.times_tasks else 1)).backward()
        for name, grad in grads(model).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-9)
        for mine, theirs in zip(learned, other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad, check_dtype=False)


@pytest.mark.parametrize("spec", STATEFUL)
def test_a_state_that_was_kept_goes_on_bit_by_bit(spec: str) -> None:
    model = network()
    balancer = Balancer(spec, TASKS)
    optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], lr=0.1)

    def steps(probe: Probe, optimizer: torch.optim.Optimizer, model: nn.Module, seeds: range) -> dict[str, Tensor]:
        assert probe.balancer is not None
        for seed in seeds:
            optimizer.zero_grad()
            probe.backward(losses(model, seed))
            optimizer.step()
            if probe.balancer.rule.looks_again:
                probe.again(losses(model, seed))
            if seed % 2:
                probe.balancer.end_epoch()
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    probe = Probe(model, balancer=balancer)
    steps(probe, optimizer, model, range(5))
    state, twin, weights = copy.deepcopy(probe.state_dict()), copy.deepcopy(model), optimizer.state_dict()
    torch.manual_seed(0)
    expected = steps(probe, optimizer, model, range(5, 9))
    again = Balancer(spec, TASKS)
    resumed = Probe(twin, balancer=again)
    resumed.load_state_dict(state)
    other = torch.optim.SGD([*twin.parameters(), *again.parameters()], lr=0.1)
    other.load_state_dict(copy.deepcopy(weights))
    torch.manual_seed(0)
    for name, value in steps(resumed, other, twin, range(5, 9)).items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(RunError, match="another balancer"):
        Probe(twin, balancer="mgda").load_state_dict(state)
    with pytest.raises(ProbeError, match="state per task"):
        resumed.backward(losses(twin, tasks=("a", "b")))


def test_a_task_that_shares_nothing_has_no_say() -> None:
    model: nn.Module = network()
    parts = {n: [["a", "b", "c"], ["d"]] for n in ("stem", "body")}
    sample = torch.randn(3, 5, dtype=torch.float64)
    model = rm.split(model, rm.Plan(tasks=TASKS, layers=parts), sample=sample)
    probe = Probe(model, balancer="mgda")
    probe.backward(losses(model))
    found = grads(model)
    model.zero_grad()
    Probe(model, balancer="mgda").backward(losses(model, tasks=("a", "b", "c")))
    for name, grad in grads(model).items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize("spec", ["cagrad", "mgda", "graddrop", "fairgrad", "uw", "db-mtl"])
def test_gradient_scaling_changes_nothing(spec: str) -> None:
    model = network(torch.float32)
    expected = balanced(spec, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.zero_grad()
    torch.manual_seed(7)
    Probe(model, balancer=Balancer(spec, TASKS)).backward(losses(model), scaler=scaler)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad / 1024, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", STEPS)
def test_under_autocast_nothing_but_the_network_is_rounded(spec: str) -> None:
    """Weights and updates are made in single precision or better from gradients that went through bfloat16."""
    model = network(torch.float32)
    shared = [p for n, p in model.named_parameters() if not n.startswith("heads")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = losses(model)
    per_task = task_gradients(rounded, shared)
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in per_task])
    assert rows.dtype == torch.float32
    step, tolerance = STEPS[spec]
    torch.manual_seed(7)
    expected = step(rows.double())
    torch.manual_seed(7)
    Probe(model, balancer=Balancer(spec, TASKS)).backward(rounded)
    found = torch.cat([cast(Tensor, p.grad).flatten() for p in shared])
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= (tolerance + 1e-5) * expected.norm()


@pytest.mark.parametrize("spec", sorted(BALANCERS))
def test_training_in_bfloat16_is_near_training_in_single_precision(spec: str) -> None:
    """Two per cent of the update, whether the losses themselves are in bfloat16 or not."""
    model = network(torch.float32)
    expected = torch.cat([g.flatten() for g in balanced(spec, model).values()])
    for engine in ("flat", "delta"):
        for kind in (torch.float32, torch.bfloat16):
            model.zero_grad()
            torch.manual_seed(7)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = {t: v.to(kind) for t, v in losses(model).items()}
            Probe(model, balancer=Balancer(spec, TASKS), engine=cast(Any, engine)).backward(values)
            found = torch.cat([g.flatten() for g in grads(model).values()])
            assert found.dtype == torch.float32
            assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", sorted(BALANCERS))
def test_an_accelerator_makes_the_same_update(spec: str) -> None:
    expected = balanced(spec, network())
    for name, grad in balanced(spec, network().cuda()).items():
        torch.testing.assert_close(grad.cpu(), expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", ["mgda", "cagrad:c=0.4", "pcgrad", "upgrad"])
def test_balancing_at_the_features_needs_their_gradients_only(spec: str) -> None:
    """Weights from the gradients where the shared part ends, applied to the losses' gradients of shared parameters."""
    model = network()
    for options in ({}, {"start": 3}):
        found = balanced(spec + ("," if ":" in spec else ":") + "at=features", model, **cast(Any, options))
        model.zero_grad()
        at = _boundary(model)
        gram = torch.zeros(4, 4, dtype=torch.float64)
        for i, a in enumerate(at):
            for j, b in enumerate(at):
                gram[i, j] = sum(float((a[k] * b[k]).sum()) for k in a.keys() & b.keys())
        torch.manual_seed(7)
        weights = Balancer(spec, TASKS).weights(gram)
        shared = [p for n, p in model.named_parameters() if not n.startswith("heads")]
        names = [n for n, _ in model.named_parameters() if not n.startswith("heads")]
        total = torch.stack([w * v for w, v in zip(weights, losses(model).values(), strict=True)]).sum()
        for name, grad in zip(names, torch.autograd.grad(total, shared), strict=True):
            torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10)
        model.zero_grad()
        torch.stack(list(losses(model).values())).sum().backward()
        torch.testing.assert_close(found["heads.a.weight"], model.heads["a"].weight.grad)


def _boundary(model: Net) -> list[dict[str, Tensor]]:
    """Per task, the gradient at the features that its head takes."""
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, 5, generator=draw).double(), torch.randn(8, len(TASKS), 2, generator=draw).double()
    z = torch.tanh(model.body(torch.relu(model.stem(x))))
    y = torch.tanh(model.pair(z))
    out = []
    for i, task in enumerate(TASKS):
        name, features = ("y", y) if task in ("a", "b") else ("z", z)
        loss = (model.heads[task](features) - (i + 1) * t[:, i]).pow(2).mean() + 0.1
        out.append({name: torch.autograd.grad(loss, features, retain_graph=True)[0]})
    return out


def test_what_is_not_finite_arrives_where_it_is_looked_for() -> None:
    for spec in ("cagrad", "graddrop"):
        model = network(torch.float32)
        bad = losses(model)
        Probe(model, balancer=spec, start=3).backward({**bad, "a": bad["a"] * math.inf})
        assert not bool(model.stem.weight.grad.isfinite().all())  # type: ignore[union-attr]


# A user's own. --------------------------------------------------------------------------------------------------------


class Halves(aggregation.Aggregator):  # type: ignore[misc, name-defined]
    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.sum(0) / 2


class Thirds(aggregation.Weighting):  # type: ignore[misc, name-defined]
    def forward(self, stat: Tensor, /) -> Tensor:
        return torch.full((len(stat),), 1 / 3, dtype=stat.dtype)


class Growing(Rule):
    def __init__(self) -> None:
        self.step = 0

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        del gram
        self.step += 1
        return torch.full_like(losses, float(self.step))


@pytest.mark.parametrize(
    ("given", "factor"), [(Halves(), 1 / 2), (Thirds(), 1 / 3), (lambda g: 2 + 0 * g[0], 2.0), (Growing(), 1.0)]
)
def test_objects_and_functions_are_taken_as_they_are(given: object, factor: float) -> None:
    model = network()
    found, expected = balanced(given, model), balanced("joint", model)
    torch.testing.assert_close(found["stem.weight"], factor * expected["stem.weight"])
    torch.testing.assert_close(found["heads.a.weight"], expected["heads.a.weight"])


def test_what_is_no_balancer_is_refused() -> None:
    for wrong, told in ((nn.Linear(2, 2), "no Aggregator"), (3, "expected a name"), (Halves, "expected a name")):
        with pytest.raises(ProblemError, match=told):
            Balancer(wrong, TASKS)
    with pytest.raises(ProblemError, match="several batches"):
        Balancer(aggregation.SDMGradWeighting(), TASKS)
    model = network()
    with pytest.raises(ProbeError, match="should return 4 weights"):
        balanced(lambda gram: gram[0, :2], model)
    with pytest.raises(ProbeError, match="not finite"):
        balanced(lambda gram: gram[0] * math.nan, model)
    with pytest.raises(ProbeError, match="Krum cannot balance 2 tasks"):
        Probe(model, balancer="krum").backward(losses(model, tasks=("a", "b")))
    with pytest.raises(ProbeError, match="exact"):
        Probe(model, balancer="mgda", exact=True)
