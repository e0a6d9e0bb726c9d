"""Split models under the rest of PyTorch: autocast, hooks, transforms, export, compilation, DDP, memory."""

import copy
import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import Cost, cost, saved_plan, split, verify, view
from reconmtl.splitting.storage import _CLASSES
from zoo import TASKS, ZOO, Block, Headed, Outer, build

X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
PLAN = Plan(tasks=TASKS, layers=["trunk.0.conv2", "trunk.1.bn1"])


@pytest.fixture
def model() -> nn.Module:
    return split(build("residual"), PLAN, sample=X)


def total(out: dict[str, Tensor]) -> Tensor:
    return torch.stack([out[t].square().sum() for t in TASKS]).sum()


def test_autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = model(X), build("residual")(X)
    assert all(out[t].dtype == torch.bfloat16 and torch.equal(out[t], expected[t]) for t in TASKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_verified_in_its_own_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    half = model.half() if dtype == torch.float16 else model.bfloat16()
    assert all(p.dtype == dtype for p in half.parameters())
    assert verify(half, X.to(dtype)).modes == ("train", "eval")


def test_inference_mode_as_first_call() -> None:
    model = split(build("residual"), PLAN).eval()
    with torch.inference_mode():
        out = model(X)
    assert all(torch.equal(out[t], build("residual").eval()(X)[t]) for t in TASKS)


def test_hooks_of_split_layers_see_plain_tensors_once_per_task(model: nn.Module) -> None:
    seen: list[Any] = []
    conv = cast(Any, model).trunk[0].conv2
    handles = [
        conv.register_forward_hook(lambda _, args, out: seen.append((type(args[0]), type(out)))),
        conv.register_full_backward_hook(lambda _, __, grads: seen.append(grads[0].shape)),
    ]
    total(model(X)).backward()
    assert seen == [(Tensor, Tensor)] * 3 + [torch.Size([3, 4, 8, 8])] * 3
    for h in handles:
        h.remove()
    gradients: list[Tensor] = []
    handle = conv.per_task["b"].weight.register_hook(gradients.append)
    total(model(X)).backward()
    handle.remove()
    assert len(gradients) == 1


def test_function_transforms(model: nn.Module) -> None:
    params: dict[str, Tensor] = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    model.eval()

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return total(functional_call(model, (p, buffers), (x,)))

    plain = torch.autograd.grad(loss(params, X), list(params.values()))
    for a, b in zip(grad(loss)(params, X).values(), plain, strict=True):
        torch.testing.assert_close(a, b)
    each = vmap(grad(loss), in_dims=(None, 0))(params, X[:, None])
    for name, g in zip(params, plain, strict=True):
        torch.testing.assert_close(each[name].sum(0), g, rtol=1e-4, atol=1e-4)


def test_gradients_batched_over_tasks(model: nn.Module) -> None:
    out = model(X)
    losses = torch.stack([out[t].square().sum() for t in TASKS])
    params = list(model.parameters())
    rows = torch.autograd.grad(
        losses, params, torch.eye(3), retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    for i in range(3):
        one = torch.autograd.grad(losses[i], params, retain_graph=True, allow_unused=True)
        for row, g in zip(rows, one, strict=True):
            if g is not None and row is not None:
                torch.testing.assert_close(row[i], g, rtol=1e-4, atol=1e-4)


def test_a_view_exports_and_compiles(model: nn.Module) -> None:
    one = view(model.eval(), "b")
    expected = model(X)["b"]
    exported = torch.export.export(one, (X,))
    assert torch.equal(exported.module()(X)["b"], expected)
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X)["b"], expected)


def test_a_compiled_split_model_runs_as_it_is(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    out, expected = compiled(X), copy.deepcopy(model)(X)
    total(out).backward()
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    assert all(p.grad is not None for p in model.parameters())
    torch.compiler.reset()


def test_safetensors_hold_everything(model: nn.Module) -> None:
    state = load(save({k: v.contiguous() for k, v in model.state_dict().items()}))
    twin = split(build("residual"), saved_plan(state))
    twin.load_state_dict(state)
    twin.eval(), model.eval()
    assert all(torch.equal(twin(X)[t], model(X)[t]) for t in TASKS)


def test_memory_kept_for_the_backward_is_that_of_hand_written_branches() -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(Block(2, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 144, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=["trunk.1"]), sample=X)
    trunk = cast(Any, copy.deepcopy(net).trunk)
    convs, norms = [copy.deepcopy(trunk[1]) for _ in TASKS], [copy.deepcopy(trunk[2]) for _ in TASKS]

    for n in norms:  # shared weight and bias, own statistics
        n.weight, n.bias = trunk[2].weight, trunk[2].bias

    def by_hand(x: Tensor) -> list[Tensor]:
        y = trunk[0](x)
        return [
            h(trunk[3](n(c(y))).flatten(1)) for c, n, h in zip(convs, norms, cast(Any, net).heads.values(), strict=True)
        ]

    def kept(run: Any) -> int:
        storages: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = run(X)
        del out
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    assert kept(model) == kept(by_hand)


def test_work_is_counted_without_building_or_computing() -> None:
    net = Headed(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), 4, TASKS)
    x = torch.randn(10, 6)
    heads = 3 * 2 * 10 * 4 * 2
    before = cost(net, sample=x)
    assert before.flops == 2 * 10 * (6 * 5 + 5 * 4) + heads
    plan = Plan(tasks=TASKS, layers={"trunk.2": [["a", "b"], ["c"]]})
    after = cost(net, plan, sample=x)
    assert after.flops == 2 * 10 * (6 * 5 + 2 * 5 * 4) + heads
    assert isinstance(after, Cost) and before.activations is not None and after.activations is not None
    assert after.activations - before.activations == 10 * 4 * 4  # the second branch's features, for the head's gradient
    assert cost(split(net, plan), sample=x) == after
    assert all(p.device.type == "cpu" for p in net.parameters())


def test_a_view_costs_what_the_original_costs(model: nn.Module) -> None:
    assert cost(view(model, "b").module, sample=X) == cost(build("residual"), sample=X)


def test_a_forward_that_needs_values_is_not_counted() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0] > 0])

    with pytest.raises(SplitError, match="leave out `sample`"):
        cost(Masked(6, 5), sample=torch.randn(10, 6))


@pytest.mark.parametrize("layer", ["trunk.0", "trunk.1.inner"])
def test_a_buffer_that_a_container_replaces_becomes_one_per_task(layer: str) -> None:
    torch.manual_seed(0)
    x, net = torch.randn(4, 6), Headed(nn.Sequential(nn.Linear(6, 6), Outer(replaces=True)), 6, TASKS)
    model = split(net, Plan(tasks=TASKS, layers=[layer]))
    twins = {t: copy.deepcopy(net) for t in TASKS}
    for t in TASKS:
        with torch.no_grad():
            cast(Any, model.get_submodule(layer)).per_task[t].weight.mul_(2 + TASKS.index(t))
            cast(Any, twins[t].get_submodule(layer)).weight.mul_(2 + TASKS.index(t))
    for _ in range(2):
        out = model(x)
        assert all(torch.equal(out[t], twins[t](x)[t]) for t in TASKS)
    state = load(save(model.state_dict()))
    for t in TASKS:
        assert torch.equal(state[f"trunk.1.per_task.{t}.average"], cast(Any, twins[t]).trunk[1].average)
    again = split(net, saved_plan(state))
    again.load_state_dict(state)
    assert all(torch.equal(again.eval()(x)[t], model.eval()(x)[t]) for t in TASKS)


# Threads, memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("name", ["residual", "outer", "remembering", "lstm", "squeeze", "tokens"])
def test_threads_that_call_one_model_get_what_one_thread_gets(name: str, called: bool) -> None:
    net, x = build(name).eval(), ZOO[name].inputs()[0]
    batches = [x if not x.is_floating_point() else x * (1 + 0.1 * i) for i in range(8)]
    layers = {"outer": "trunk.0", "remembering": "trunk.1", "lstm": "trunk.rnn", "squeeze": "trunk.point"}
    layer = {**layers, "residual": "trunk.0.bn1", "tokens": "blocks.0.norm1"}[name]
    for _ in range(3):
        model = split(net, Plan(tasks=TASKS, layers=[layer]), atomic=ZOO[name].atomic)
        if called:
            model(x)
        twin = copy.deepcopy(model)
        expected = [twin(b) for b in batches] * 3
        with ThreadPoolExecutor(4) as pool:
            outs = list(pool.map(model, batches * 3))
        assert all(torch.equal(a[t], b[t]) for a, b in zip(outs, expected, strict=True) for t in TASKS)


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("name", ["residual", "remembering", "lstm", "checkpointed"])
def test_nothing_grows(name: str) -> None:
    net, x = build(name), ZOO[name].inputs()[0]
    layers = {"residual": "trunk.0.bn1", "remembering": "trunk.1", "lstm": "trunk.rnn", "checkpointed": "trunk.a"}
    plan = Plan(tasks=TASKS, layers=[layers[name]])
    model = split(net, plan, sample=x)

    def steps(n: int) -> tuple[int, int, int]:
        for _ in range(n):
            model.zero_grad()
            total(model(x)).backward()
        for _ in range(n // 10):
            split(net, plan, sample=x)
        return living_tensors(), len(gc.get_objects()), len(_CLASSES)

    first = steps(20)
    then = steps(200)
    assert then[0] <= first[0]
    assert then[1] - first[1] < 200  # caches of groups and names
    assert then[2] <= first[2]


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29587")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_around_a_split_model(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for m in (wrapped, twin):
        total(m(X)).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(cast(Tensor, a.grad), cast(Tensor, b.grad))
    with pytest.raises(SplitError, match="DistributedDataParallel"):
        split(nn.parallel.DistributedDataParallel(build("residual")), PLAN)


def test_synchronised_batch_norm_is_converted_before_the_split() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(build("residual"))
    model = split(net, PLAN, sample=X)
    assert isinstance(cast(Any, model).trunk[1].bn1, nn.SyncBatchNorm)
    assert all(torch.equal(model.eval()(X)[t], net.eval()(X)[t]) for t in TASKS)
    with pytest.raises(SplitError, match="Convert the model first"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
