"""Split models with ONNX, compilers, several processes, sharding, checkpointing and checkpoint files."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import check_optimizer, split, verify, view
from zoo import TASKS, ZOO, Headed, residual

LAYERS = ("trunk.0.bn1", "trunk.1.conv1")


def plan(*layers: str) -> Plan:
    return Plan(tasks=TASKS, layers=layers)


@pytest.fixture
def x() -> Tensor:
    return cast(Tensor, ZOO["residual"].inputs()[0])


def build() -> nn.Module:
    torch.manual_seed(0)
    return residual(TASKS)


def perturb(model: nn.Module) -> None:
    """Make the copies differ, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    made = split(build(), plan(*LAYERS), sample=x)
    perturb(made)
    return made


def same(out: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(out) == list(expected) and all(torch.equal(out[t], expected[t]) for t in expected)


def total(out: dict[str, Tensor]) -> Tensor:
    return torch.stack([(i + 1) * out[t].square().mean() for i, t in enumerate(TASKS)]).sum()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total(model(x)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# Export and compilation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_view_exports(model: nn.Module, x: Tensor, strict: bool) -> None:
    one = view(model.eval(), "b")
    program = torch.export.export(one, (x,), strict=strict)
    assert same(cast(Any, program.module())(x), {"b": model(x)["b"]})
    assert {k.removeprefix("module.") for k in program.state_dict} == set(build().state_dict())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own, while it exports
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_a_view_runs_under_onnx(name: str, model: nn.Module, x: Tensor) -> None:
    pytest.importorskip("onnxscript", reason="the development group is not installed")
    runtime: Any = pytest.importorskip("onnxruntime", reason="the development group is not installed")
    if name == "vit":
        tr: Any = pytest.importorskip("transformers", reason="the development group is not installed")
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        vit = tr.ViTModel(tr.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=2))
        model = split(vit, plan("layers.1.*", "layernorm"), sample=x)
        perturb(model)
    one = view(model.eval(), "b")
    program: Any = torch.onnx.export(one, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    expected = model(x)["b"]
    torch.testing.assert_close(out, expected if name == "residual" else expected[0], rtol=1e-5, atol=1e-5)
    assert not any("per_task" in i.name for i in program.model_proto.graph.initializer)


@pytest.mark.parametrize("training", [True, False])
def test_a_view_compiles_in_one_graph_and_trains(model: nn.Module, x: Tensor, training: bool) -> None:
    model.train(training)
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(view(model, "c"), backend="eager", fullgraph=True)
    out, expected = compiled(x)["c"], twin(x)["c"]
    assert torch.equal(out, expected)
    out.sum().backward(), expected.sum().backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_a_view_compiles_with_inductor(model: nn.Module, x: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(view(model.eval(), "a"), fullgraph=True)
    torch.testing.assert_close(compiled(x)["a"], model(x)["a"], rtol=1e-4, atol=1e-4)


def test_a_compiled_split_model_that_was_never_called_learns_and_refuses_as_ever(x: Tensor) -> None:
    torch.compiler.reset()
    model = split(build(), plan(*LAYERS))
    assert same(torch.compile(copy.deepcopy(model), backend="eager")(x), model(x))
    net = build()
    cast(Any, net).unused = nn.Linear(2, 2)
    with pytest.raises(SplitError, match="unused"):
        torch.compile(split(net, plan("unused")), backend="eager")(x)


def test_a_split_model_exports_once_it_was_called(model: nn.Module, x: Tensor) -> None:
    model.eval()
    assert same(cast(Any, torch.export.export(model, (x,)).module())(x), model(x))


# Checkpointing ------------------------------------------------------------------------------------------------------


class Checkpointed(Headed):
    """A residual trunk whose second block is computed again in the backward."""

    reentrant = False
    nested = False

    def __init__(self) -> None:
        trunk = build()
        super().__init__(trunk.get_submodule("trunk"), 4, TASKS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, second, pool = cast(nn.Sequential, self.trunk)
        block: Any = second
        if self.nested:
            block = partial(checkpoint, second, use_reentrant=False)
        y = checkpoint(block, first(x), use_reentrant=self.reentrant)
        return {t: h(pool(y).flatten(1)) for t, h in self.heads.items()}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("layers", [["trunk.0.conv2"], ["trunk.1.conv1"], ["trunk.1.bn2", "trunk.1.conv2"]], ids=str)
def test_checkpointing_gives_the_gradients_of_one_network_per_task(x: Tensor, layers: list[str], nested: bool) -> None:
    torch.manual_seed(0)
    net, x = Checkpointed().double(), x.double()
    net.nested = nested
    cast(Any, net.trunk)[1].relu.inplace = False
    model = split(net, plan(*layers), sample=x)
    perturb(model)
    plain = copy.deepcopy(model)
    mine = gradients(model, x)
    for t in TASKS:  # views of a twin add up to the same
        one = view(plain, t)
        ((TASKS.index(t) + 1) * one(x)[t].square().mean()).backward()
    for n, p in plain.named_parameters():
        torch.testing.assert_close(mine[n], p.grad, rtol=1e-10, atol=1e-12)


def test_values_kept_elsewhere_for_the_backward(x: Tensor) -> None:
    model = split(build().double(), plan(*LAYERS), sample=x.double())
    perturb(model)
    expected = gradients(copy.deepcopy(model), x.double())
    with torch.autograd.graph.save_on_cpu():
        mine = gradients(model, x.double())
    for n, g in expected.items():
        torch.testing.assert_close(mine[n], g, rtol=1e-10, atol=1e-12)


def test_reentrant_checkpointing_is_refused_before_a_gradient_is_used(x: Tensor) -> None:
    net = Checkpointed()
    net.reentrant = True
    with pytest.raises(SplitError, match="use_reentrant=False"):
        split(net, plan("trunk.0.conv2"))(x)


# Precision, devices, files ------------------------------------------------------------------------------------------


def test_autocast_gives_each_task_what_its_view_gives(model: nn.Module, x: Tensor) -> None:
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        expected = {t: view(model, t)(x)[t] for t in TASKS}
    assert all(o.dtype == torch.bfloat16 for o in out.values())
    assert same(out, expected)


def test_a_model_built_without_memory_is_filled_from_a_checkpoint(model: nn.Module, x: Tensor) -> None:
    with torch.device("meta"):
        net = residual(TASKS)
    empty = split(net, plan(*LAYERS))
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert same(filled.eval()(x), model.eval()(x))
    late = split(net, plan(*LAYERS))
    late.load_state_dict(model.state_dict(), assign=True)
    assert same(late.eval()(x), model.eval()(x))


def test_safetensors_of_a_whole_model(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    save_model(model, str(tmp_path / "model.safetensors"))
    twin = split(residual(TASKS), plan(*LAYERS))
    missing, unexpected = load_model(twin, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert same(twin.eval()(x), model.eval()(x))


def test_averaged_weights(model: nn.Module, x: Tensor) -> None:
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert same(average.eval()(x), model.eval()(x))


def test_hooks_on_parameters_and_copies(model: nn.Module, x: Tensor) -> None:
    seen: list[str] = []
    conv = cast(Any, model).trunk[1].conv1
    for t in TASKS:
        conv.per_task[t].weight.register_hook(lambda g, t=t: seen.append(t))  # noqa: ARG005
    model(x)["b"].sum().backward()
    assert seen == ["b"]
    conv.weight.register_hook(lambda g: seen.append("each"))  # noqa: ARG005
    total(model(x)).backward()
    assert sorted(seen[1:]) == ["a", "b", "c", "each", "each", "each"]


# Several processes --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Without BatchNorm, so that two halves of a batch are the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.split = nn.Linear(6, 6)
        self.after = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(6, 2) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.after(self.split(self.before(x)))
        return {t: h(y) for t, h in self.heads.items()}


def reference() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """The network, a batch, and the gradients of the split model in one process."""
    torch.manual_seed(0)
    net, x = Plain().double(), torch.randn(8, 4, dtype=torch.float64)
    return net, x, gradients(split(net, plan("split")), x)


def check_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        grad: Any = p.grad
        assert grad is not None, name
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(whole, expected[name.removeprefix("module.")], rtol=1e-10, atol=1e-12)


def distributed_data_parallel(rank: int) -> None:
    net, x, expected = reference()
    for sample in (x, None):
        model = nn.parallel.DistributedDataParallel(split(net, plan("split"), sample=sample))
        for _ in range(2):
            model.zero_grad()
            total(model(x[4 * rank : 4 * rank + 4])).backward()
            check_gradients(model, expected)
        check_optimizer(model.module, torch.optim.SGD(model.parameters(), lr=0.1))


def fully_sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    net, x, expected = reference()
    mine = x[4 * rank : 4 * rank + 4]
    for names in (["before"], ["before", ""]):  # a block before the split; then the rest with the root
        model = split(net, plan("split"), sample=x)
        for name in names:
            fully_shard(model.get_submodule(name), mesh=mesh)
        total(model(mine)).backward()
        sharded = (
            nn.ModuleDict({"all": model}) if "" in names else nn.ModuleDict({"all": model.get_submodule("before")})
        )
        prefix = "" if "" in names else "before."
        check_gradients(sharded["all"], {n.removeprefix(prefix): g for n, g in expected.items()})
    model = split(net, plan("split"), sample=x)
    fully_shard(cast(nn.Module, model.after), mesh=mesh)
    try:
        model(mine)
    except SplitError as error:
        assert "FSDP" in str(error), error
    else:
        raise AssertionError("a block behind the split was sharded alone, and nothing was said")
    try:
        split(model, plan("after.0"))
    except SplitError:
        pass
    else:
        raise AssertionError("a sharded model was split")


def in_two_processes(worker: Callable[[int], None], folder: Path) -> None:
    """Run a function of this file as rank 0 and 1 of a gloo group."""
    here = Path(__file__).resolve()
    code = (
        f"import os, sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[1])!r}]\n"
        "import torch.distributed as dist\n"
        f"import {here.stem} as tests\n"
        "rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{folder / 'store'}', rank=rank, world_size=2)\n"
        f"tests.{worker.__name__}(rank)\n"
        "dist.barrier()\n"
        "os._exit(0)\n"  # gloo's threads may still run, and abort an orderly end
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(r)], env=environment, stderr=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    try:
        errors = [p.communicate(timeout=120)[1] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(errors)[-3000:]


@pytest.mark.parametrize("worker", [distributed_data_parallel, fully_sharded], ids=lambda f: f.__name__)
def test_two_processes_give_the_gradients_of_one(worker: Callable[[int], None], tmp_path: Path) -> None:
    in_two_processes(worker, tmp_path)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_split_model_is_not_scripted(model: nn.Module) -> None:
    with pytest.raises(SplitError, match=r"rm\.view"):
        torch.jit.script(model)


def test_export_before_the_first_call_is_refused(x: Tensor) -> None:
    with pytest.raises(SplitError, match="sample="):
        torch.export.export(split(build(), plan(*LAYERS)), (x,))


def test_synchronised_statistics_are_converted_before_the_split(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(SplitError, match="first"):
        nn.SyncBatchNorm.convert_sync_batchnorm(split(build(), plan("trunk.1.conv1"), sample=x))
    with pytest.raises(SplitError, match=r"trunk\.0\.bn1.*Convert the model first"):  # a BatchNorm that is split itself
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_threads_that_share_a_model_are_refused(model: nn.Module) -> None:
    with pytest.raises(SplitError, match="DistributedDataParallel"):
        cast(Any, model)._replicate_for_data_parallel()


def test_inference_mode_first_and_training_after(x: Tensor) -> None:
    model, twin = split(build(), plan(*LAYERS)), split(build(), plan(*LAYERS))
    with torch.inference_mode():
        model.eval()(x)
    twin.eval()(x)
    mine, expected = gradients(model.train(), x), gradients(twin.train(), x)
    assert all(torch.equal(mine[n], g) for n, g in expected.items())


def test_reading_a_gradient_that_some_copies_lack_says_so(model: nn.Module, x: Tensor) -> None:
    model(x)["a"].sum().backward()
    with pytest.raises(SplitError, match="differ between tasks"):
        _ = cast(Any, model).trunk[1].conv1.weight.grad
    total(model(x)).backward()
    verify(model, x)
