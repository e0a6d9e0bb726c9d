"""Training under torch.compile: what a compiled network computes is what the network computes."""

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import reconmtl as rm
from reconmtl.batches import call
from reconmtl.compiled import Compiled, compile_faults
from reconmtl.errors import ProblemError, RunError
from reconmtl.evaluation import Machine
from reconmtl.forward import Forward
from reconmtl.layers import TaskCopies
from reconmtl.plan import Plan
from reconmtl.problems import planted
from reconmtl.splitting import split
from reconmtl.splitting.outputs import get_task
from reconmtl.splitting.structure import tensors
from reconmtl.splitting.together import together
from zoo import NETS, TASKS, ZOO, build, sample, shared_layers, without_dropout

CPU = torch.device("cpu")
AS_THEY_ARE = {
    "soft_sharing": "tasks depend on each other",  # a task's network runs the shared attention for the other tasks too
    "remembering": r"keeps something in an attribute \(trunk\.1\.steps\)",
    "norms": "cannot make one graph",  # a BatchNorm's cumulative average depends on a count that is a tensor
    **dict.fromkeys(("lstm", "gru", "rnn"), "cannot make one graph"),
}
"""Networks of the zoo that one graph cannot repeat."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    # The tracer's own:
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def step(network: Any, model: nn.Module, inputs: Any) -> dict[str, list[Tensor]]:
    """Outputs of one pass, of which the losses are made whose gradients the model then has."""
    model.zero_grad()
    out = network(inputs)
    found = {t: [x for x in tensors(get_task(out, t)) if x.is_floating_point()] for t in TASKS}
    losses = [(i + 1) * x.square().mean() for i, t in enumerate(TASKS) for x in found[t]]
    torch.stack(losses).sum().backward()
    return found


def perturb(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    return model


def same(model: nn.Module, twin: nn.Module, found: Any, expected: Any) -> None:
    for task in TASKS:
        for a, b in zip(found[task], expected[task], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)
    mine, theirs = dict(model.named_buffers()), dict(twin.named_buffers())
    assert mine.keys() == theirs.keys()
    for name, buffer in mine.items():
        torch.testing.assert_close(buffer, theirs[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("groups", [None, [["a", "c"], ["b"]]], ids=["tasks", "groups"])
@pytest.mark.parametrize("name", [n for n in ZOO if n != "resnet18"])
def test_a_compiled_split_network_is_the_split_network(name: str, groups: Any) -> None:
    choices, pick = shared_layers(name, build(name)), random.Random(name)
    layers = [n for some in pick.sample(choices, pick.randint(1, len(choices))) for n in some]
    plan = Plan(tasks=TASKS, layers={n: groups or [[t] for t in TASKS] for n in layers})
    net = without_dropout(build(name)).double().train()
    model = perturb(split(net, plan, atomic=NETS[name].atomic, sample=sample(name)))
    twin, compiled = copy.deepcopy(model), Compiled(model, TASKS, "eager")
    if name in AS_THEY_ARE:
        with pytest.warns(RuntimeWarning, match=AS_THEY_ARE[name]):
            compiled(sample(name))
        model = copy.deepcopy(twin)
        compiled.model = model
    for _ in range(2):  # running statistics too
        expected = step(lambda x: call(twin, x), twin, sample(name))
        same(model, twin, step(compiled, model, sample(name)), expected)
    assert (graphs() > 0) == (name not in AS_THEY_ARE)


class Stem(nn.Module):
    """Layers that tasks share before one that is split; their outputs are changed in place afterwards."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.drop = nn.Linear(6, 6), nn.Dropout(dropout)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.norm(self.first(x)).mul_(2).relu_()
        z = self.drop(self.second(z)) + self.norm(z)
        return {t: head(z) for t, head in self.heads.items()}


def test_what_tasks_share_before_the_first_split_runs_once() -> None:
    seen: list[str] = []

    def counting(graph: Any, _: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.register_backend(counting)
    x = torch.randn(5, 4)
    model = perturb(split(Stem(), Plan(tasks=TASKS, layers=["second"]), sample=x))
    Compiled(model, TASKS, "counting")(x)
    assert sum("batch_norm" in f for f in seen) == 2
    assert sum("linear" in f for f in seen) == 1 + 3 + 3 * 2  # first; second; heads, for their task and for the others
    assert model.get_buffer("norm.num_batches_tracked") == 2


# What a first batch does not show. ------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Three layers, the second one split, and what happens around it."""

    def __init__(self, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = norm() if norm is nn.Identity else nn.BatchNorm1d(6)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.out(self.third(self.norm(self.second(self.first(x)))))

    def out(self, z: Tensor) -> dict[str, Tensor]:
        return {t: head(z) for t, head in self.heads.items()}


class Gated(Steps):
    """At first the split layer adds nothing to what is behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.first(x)
        return self.out(self.third(z + self.gate * self.second(z)))


class Sized(Steps):
    """The split layer is there for large batches only."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.first(x)
        return self.out(self.third(self.second(z) if len(z) > 5 else z))


class Valued(Steps):
    """The split layer is there for some inputs only."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.first(x)
        return self.out(self.third(self.second(z) if x.sum() > 0 else z))


class Clamping(Steps):
    """A module changes what it gets, but not the first values."""

    def __init__(self) -> None:
        super().__init__()
        self.clamp = nn.Hardtanh(-9.0, 9.0, inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.first(x)
        return self.out(self.second(self.clamp(z)) + z)


class Writing(Steps):
    """The forward changes its inputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x.mul_(2))


class Noting(Steps):
    """Keeps a value, which whoever asks the network for it would miss."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen = self.first(x)
        return self.out(self.second(self.seen))


class Deep(Steps):
    """Statistics in the trunk, between splits and in heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.heads = nn.ModuleDict({t: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1)) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.out(self.third(self.norm2(self.second(self.norm(self.first(x))))))


class Trunk(Steps):
    """No heads."""

    def out(self, z: Tensor) -> Any:
        return z


def batch(size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, 4, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


def frozen(model: nn.Module, k: int) -> None:
    model.get_submodule("norm").train(k < 1)


def replaced(model: nn.Module, k: int) -> None:
    for module in model.modules() if k == 1 else ():
        module._buffers = {n: b if b is None else b + 1 for n, b in module._buffers.items()}


def thawed(model: nn.Module, k: int) -> None:
    model.get_submodule("first").requires_grad_(k % 2 == 0)


def untouched(model: nn.Module, k: int) -> None:
    pass


SAME: Any = [batch(7)] * 4
TREE = {"second": [["a", "b"], ["c"]], "third": [["a"], ["b"], ["c"]]}
CROSSED = {"second": [["a", "c"], ["b"]], "third": [["a"], ["b", "c"]]}


@pytest.mark.parametrize(
    ("make", "batches", "before", "layers", "why_not", "stats"),
    [
        (Gated, SAME, untouched, ["second"], "", "per-task"),
        (Sized, [batch(4), batch(7), batch(4)], untouched, ["second"], "depends on the batch", "per-task"),
        (Sized, [batch(7), batch(8), batch(9), batch(6)], untouched, ["second"], "", "per-task"),
        (Valued, [batch(7).abs(), -batch(7).abs()], untouched, ["second"], "cannot make one graph", "per-task"),
        (Clamping, [batch(7), batch(7, 50)], untouched, ["second"], "", "per-task"),
        (Writing, SAME, untouched, ["second"], "writes to its inputs", "per-task"),
        (Noting, SAME, untouched, ["second"], r"attribute \(seen\)", "per-task"),
        (Deep, SAME, untouched, ["second"], "", "per-task"),
        (Deep, SAME, untouched, TREE, "", "per-task"),
        (Deep, SAME, untouched, CROSSED, "", "per-task"),
        (Deep, SAME, frozen, ["second"], "", "per-task"),
        (Deep, SAME, replaced, TREE, "", "per-task"),
        (Deep, SAME, thawed, ["second"], "", "per-task"),
        (Deep, [batch(7), batch(7), batch(3), batch(7), batch(2)], untouched, TREE, "", "per-task"),
        (Trunk, SAME, untouched, ["second"], "", "per-task"),
        (Deep, SAME, untouched, ["second"], "", "shared"),
        (Deep, SAME, untouched, CROSSED, "do not repeat", "shared"),  # a branch of a and c, then one each
    ],
)
def test_later_steps_are_those_of_the_split_network(
    make: Callable[[], nn.Module], batches: Any, before: Any, layers: Any, why_not: str, stats: str
) -> None:
    torch.manual_seed(0)
    plan, sample = Plan(tasks=TASKS, layers=layers), batch(7).abs()
    model = split(make().double(), plan, sample=sample, norm_stats=stats)
    for copies in (m for m in model.modules() if isinstance(m, TaskCopies)):
        perturb(copies)
    twin, compiled = copy.deepcopy(model), Compiled(model, TASKS, "eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for k, x in enumerate(batches):
            before(model, k)
            before(twin, k)
            expected = step(twin, twin, x.clone())
            same(model, twin, step(compiled, model, x.clone()), expected)
            with torch.no_grad():
                for p in (*model.parameters(), *twin.parameters()):
                    p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
    assert re.search(why_not, compiled.why_not) if why_not else not compiled.why_not
    assert len([w for w in told if "runs as it is" in str(w.message)]) == bool(why_not)


def test_every_network_of_a_process_is_compiled() -> None:
    for width in range(1, 12):  # PyTorch gives up when it has compiled one function eight times
        plan = Plan(tasks=TASKS, layers=["0"])
        model = split(nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1)), plan, sample=torch.ones(1, 4))
        Compiled(model, TASKS, "eager")(torch.ones(2, 4))
    assert graphs() == 11


def test_an_unsplit_network_gives_nothing_that_was_not_asked_for_a_gradient() -> None:
    model = Stem()
    compiled = Compiled(model, ["a"], "aot_eager")
    out = compiled(torch.randn(5, 4))
    out["a"].sum().backward()
    assert list(out) == ["a"]
    assert [t for t in TASKS if model.get_parameter(f"heads.{t}.weight").grad is not None] == ["a"]


def test_a_pass_that_breaks_off_leaves_nothing_to_the_next() -> None:
    class Strict(Stem):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.first(x)
            if len(x) > 7:
                raise ValueError("too many")
            return {t: head(self.second(z)) for t, head in self.heads.items()}

    model = split(Strict().double(), Plan(tasks=TASKS, layers=["second"]), sample=batch(7))
    function = together(model, TASKS, {"first": (0, 0, 0)})
    with pytest.raises(ValueError, match="too many"):
        function(batch(8))
    for task, value in model(batch(7)).items():
        torch.testing.assert_close(function(batch(7))[task], value)


def test_dropout_in_a_split_network_runs_as_it_is() -> None:
    x = torch.randn(5, 4)
    model = split(Stem(0.5), Plan(tasks=TASKS, layers=["second"]), sample=x)
    twin, compiled = copy.deepcopy(model), Compiled(model, TASKS, "eager")
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=r"Stem runs as it is, without torch\.compile: .*dropout"):
        found = compiled(x)
    torch.manual_seed(0)
    expected = twin(x)
    assert all(torch.equal(found[t], expected[t]) for t in TASKS)
    assert not graphs()


def test_what_cannot_be_compiled_is_named() -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such operation")

    torch._dynamo.register_backend(broken)
    with pytest.raises(RunError, match=r"\(backend 'broken'\) cannot compile Stem: .*no such operation.* Leave out"):
        Compiled(Stem(), TASKS, "broken")(torch.randn(5, 4))


def test_errors_of_the_network_stay_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Compiled(Stem(), TASKS, "eager")(torch.randn(5, 3))


# Trainings. -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"epochs": 2, "milestones": (1,), "batch_size": 16}


def problem() -> rm.Problem:
    return planted.make()


class Partial:
    """Most batches have no target of the last task; those that have are compiled."""

    def __init__(self, of: Any, last: str) -> None:
        self.of, self.last, self.fingerprint = of, last, "partial"

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Any:
        x, targets = self.of[i]
        return x, {t: y for t, y in targets.items() if t != self.last or i % 16 == 0}


@pytest.mark.parametrize("how", ["joint", "single", "split", "partial"])
def test_a_compiled_training_ends_like_one_that_is_not(how: str) -> None:
    of = problem()
    options: dict[str, Any] = {"method": how} if how == "single" else {}
    if how == "split":
        options["plan"] = Plan(tasks=of.task_names, layers=["blocks.0", "blocks.3"])
    if how == "partial":
        of.train, options = Partial(of.train, of.task_names[-1]), {"batch_size": 8}
    options = {**SMALL, "weight_decay": 0.1, **options}  # moves what has a gradient, zeros too
    backend = "aot_eager" if how in ("single", "partial") else "eager"  # the first makes backward passes of its own
    (plain,) = rm.fit(of, **options)
    assert not graphs()
    (compiled,) = rm.fit(of, **options, machine=Machine(compile=backend))
    assert graphs() > 0
    assert compiled.parameters == plain.parameters
    expected = plain.model().state_dict()
    for name, value in compiled.model().state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_looks_into_the_graph_runs_as_it_is() -> None:
    machine = Machine(compile="eager")
    with pytest.warns(RuntimeWarning, match="record=0"):
        (recorded,) = rm.fit(problem(), record=1, **SMALL, machine=machine)
    (plain,) = rm.fit(problem(), record=1, **SMALL)
    rm.fit(problem(), method="mgda", **SMALL, machine=machine)
    rm.probe(problem(), epochs=1, machine=machine)
    assert not graphs()
    assert recorded.log is not None and plain.log is not None and recorded.log.steps == plain.log.steps


def test_a_folder_is_continued_as_it_was_begun(tmp_path: Path) -> None:
    (run,) = rm.fit(problem(), out=tmp_path, machine=Machine(compile="eager"), **SMALL)
    assert run.config["machine"]["compile"] == "eager"
    with pytest.raises(RunError, match=r"machine\.compile = 'eager', now None"):
        rm.fit(problem(), out=tmp_path, resume=True, **SMALL)


def test_tasks_with_data_of_their_own_are_compiled_each_for_itself() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean()

    of = rm.Problem(
        model=Stem,
        tasks=[rm.Task(t, loss=loss) for t in TASKS],
        train=[(torch.randn(4), dict.fromkeys(TASKS, torch.zeros(1))) for _ in range(4)],
        test=[(torch.randn(4), dict.fromkeys(TASKS, torch.zeros(1))) for _ in range(4)],
        recipe=rm.Recipe(epochs=1, batch_size=4, lr=0.1),
    )
    model = split(Stem(), Plan(tasks=TASKS, layers=["second"]), sample=torch.randn(5, 4))
    x = torch.randn(5, 4)
    plain, compiled = Forward(of, model), Forward(of, model, "eager")
    for task in TASKS:
        torch.testing.assert_close(compiled(task, x)[task], plain(task, x)[task])
    assert graphs() == len(TASKS)
    with torch.no_grad():
        compiled(TASKS[0], x)
    assert graphs() == len(TASKS)  # evaluations run as they are


# What cannot be. ------------------------------------------------------------------------------------------------------


def test_unknown_backends_are_refused_before_anything_is_trained() -> None:
    assert "Nearest: 'inductor'" in compile_faults("inducto", CPU)[0]
    with pytest.raises(ProblemError, match="no such backend"):
        rm.fit(problem(), machine=Machine(compile="inducto"))
    with pytest.raises(ProblemError, match="expected True, False, or a backend"):
        Machine(compile=3)  # type: ignore[arg-type]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    assert compile_faults("inductor", CPU) == []
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "apt install g++" in compile_faults("inductor", CPU)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install triton" in compile_faults("inductor", torch.device("cuda"))[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_inductor_compiles_a_split_residual_network() -> None:
    from reconmtl.networks.resnet import MultiFashionNet

    torch.manual_seed(0)
    x = torch.randn(4, 1, 36, 36)
    net = MultiFashionNet(width=4, tasks=("digit", "fashion"), classes=10)
    model = perturb(split(net, Plan(tasks=["digit", "fashion"], layers=["layer3.0.conv1", "layer4.1.bn2"]), sample=x))
    twin, compiled = copy.deepcopy(model), Compiled(model, ["digit", "fashion"])
    for _ in range(2):
        for network, run in ((model, compiled), (twin, twin)):
            network.zero_grad()
            torch.stack([o.square().mean() for o in run(x).values()]).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4, msg=name)
