"""Parametrisation, pruning, quantisation, fusion and tracing of split models: right, or refused with the way out."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import split, verify, view
from zoo import TASKS, Headed, build

X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS = ("trunk.0.conv2", "trunk.1.bn1")


def plan(*layers: str) -> Plan:
    return Plan(tasks=TASKS, layers=layers or LAYERS)


def perturb(model: nn.Module) -> None:
    """Make the copies differ, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


@pytest.fixture
def model() -> nn.Module:
    made = split(build("residual"), plan(), sample=X)
    perturb(made)
    return made


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module)


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Half()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "old weight_norm": old_weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("where", ["trunk.0.conv2", "trunk.0.conv2.per_task.a"], ids=["layer", "copy"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_converting_a_split_layer_or_a_copy_is_refused_and_changes_nothing(
    model: nn.Module, name: str, where: str
) -> None:
    twin = copy.deepcopy(model)
    with pytest.raises(SplitError, match=r"(trunk\.0\.conv2|per_task).*Convert the model first.*rm\.view"):
        CONVERSIONS[name](model.get_submodule(where))
    assert list(model.state_dict()) == list(twin.state_dict())
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in twin.modules()]
    out, expected = model(X), twin(X)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)


def test_parametrising_a_layer_with_statistics_per_task_is_refused(model: nn.Module) -> None:
    with pytest.raises(SplitError, match=r"trunk\.1\.bn2"):
        parametrize.register_parametrization(model.get_submodule("trunk.1.bn2"), "weight", Half())
    assert parametrize.is_parametrized(model.get_submodule("trunk.0.conv2")) is False  # asking is free


@pytest.mark.parametrize("layer", ["trunk.0.conv1", "trunk.1.conv2"], ids=["before the split", "behind it"])
@pytest.mark.parametrize("name", ["parametrize", "weight_norm", "prune", "old weight_norm"])
def test_shared_layers_are_converted_as_ever(model: nn.Module, name: str, layer: str) -> None:
    CONVERSIONS[name](model.get_submodule(layer))
    verify(model, X)
    out = model.eval()(X)
    for t in TASKS:
        one = split(build("residual"), plan(), sample=X)
        perturb(one)
        alone = view(one.eval(), t).module
        CONVERSIONS[name](alone.get_submodule(layer))
        assert torch.equal(out[t], cast(Any, alone)(X)[t])


@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_was_converted_first_is_split(name: str) -> None:
    net = build("residual")
    layer = net.get_submodule("trunk.0.conv2")
    CONVERSIONS[name](layer)
    owner = "trunk.0.conv2.parametrizations.weight" if parametrize.is_parametrized(layer) else "trunk.0.conv2"
    model = split(net, plan(owner), sample=X)
    perturb(model)
    assert verify(model, X).modes == ("train", "eval")
    model.eval()
    assert all(torch.equal(model(X)[t], view(model, t)(X)[t]) for t in TASKS)
    assert not torch.equal(model(X)["a"] - net.eval()(X)["a"], model(X)["b"] - net(X)["b"])


@pytest.mark.parametrize("layer", ["trunk.0.conv1", "trunk.0.conv2"], ids=["converted", "split"])
def test_a_view_is_pruned_alone(model: nn.Module, layer: str) -> None:
    before = {t: o.clone() for t, o in model.eval()(X).items()}
    one = view(model, "b")
    prune.l1_unstructured(one.module.get_submodule(layer), "weight", 0.5)
    assert not torch.equal(one(X)["b"], before["b"])
    assert all(torch.equal(model(X)[t], before[t]) for t in TASKS)


# Quantisation, fusion -----------------------------------------------------------------------------------------------


def quantised(net: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.ao.quantization.quantize_dynamic(net, {nn.Linear}))


def prepared(net: nn.Module, *, training: bool) -> None:
    q: Any = torch.ao.quantization
    cast(Any, net).qconfig = q.get_default_qat_qconfig("x86") if training else q.get_default_qconfig("x86")
    (q.prepare_qat if training else q.prepare)(net, inplace=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao announces its successor
@pytest.mark.parametrize(
    "convert",
    [
        quantised,
        lambda m: prepared(m.eval(), training=False),
        lambda m: prepared(m.train(), training=True),
        lambda m: torch.ao.quantization.fuse_modules(m.eval(), [["trunk.0.conv2", "trunk.0.bn2"]]),
        lambda m: fusion.fuse_conv_bn_eval(m.eval().get_submodule("trunk.0.conv2"), m.get_submodule("trunk.0.bn2")),
    ],
    ids=["dynamic", "static", "aware", "fuse_modules", "fuse_conv_bn"],
)
def test_quantising_and_fusing_a_split_model_is_refused(model: nn.Module, convert: Any) -> None:
    expected = copy.deepcopy(model)(X)
    with pytest.raises(SplitError, match=r"rm\.view\(model, task\)\.module"):
        convert(model)
    out = model.train()(X)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_view_is_quantised() -> None:
    torch.manual_seed(0)
    net = Headed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), 6, TASKS).eval()
    x = torch.randn(4, 6)
    model = split(net, plan("trunk.2"), sample=x)
    perturb(model)
    alone = Headed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), 6, TASKS).eval()
    alone.load_state_dict(view(model, "b").module.state_dict())
    mine = quantised(view(model, "b").module)
    assert type(mine.get_submodule("trunk.2")) is torch.ao.nn.quantized.dynamic.Linear
    assert torch.equal(cast(Any, mine)(x)["b"], cast(Any, quantised(alone))(x)["b"])


# Tracing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [True, False])
def test_symbolic_tracing_is_refused_and_a_view_is_traced(called: bool) -> None:
    trunk = build("residual").get_submodule("trunk")
    model = split(trunk, plan("0.conv2"), sample=X if called else None).eval()
    for traced in (model, nn.Sequential(nn.Identity(), model), nn.Sequential(model.get_submodule("0"))):
        with pytest.raises(SplitError, match=r"torch\.fx.*rm\.view"):
            torch.fx.symbolic_trace(traced)
    graph = torch.fx.symbolic_trace(view(model, "b").module)
    assert torch.equal(graph(X), model(X)["b"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_split_model_is_right(model: nn.Module) -> None:
    model.eval()
    traced = cast(Any, torch.jit.trace(model, X, strict=False))
    other = X * 0.5 + 0.1
    out, expected = traced(other), model(other)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    one = cast(Any, torch.jit.trace(view(model, "b"), X, strict=False))
    assert torch.equal(one(other)["b"], expected["b"])
    fresh = split(build("residual").eval(), plan())
    traced = cast(Any, torch.jit.trace(fresh, X, strict=False, check_trace=False))
    assert all(torch.equal(traced(other)[t], fresh(other)[t]) for t in TASKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_view_is_scripted() -> None:
    trunk = split(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), plan("0"))
    perturb(trunk)
    x = torch.randn(2, 6)
    scripted = cast(Any, torch.jit.script(view(trunk, "b").module))
    assert torch.equal(scripted(x), trunk(x)["b"])
    with pytest.raises(SplitError, match=r"rm\.view"):
        torch.jit.script(trunk)


# Methods of other libraries -----------------------------------------------------------------------------------------


def test_methods_that_know_one_task_only_are_refused_for_the_whole_model() -> None:
    tr: Any = pytest.importorskip("transformers", reason="the development group is not installed")
    sizes: Any = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    net = tr.GPT2LMHeadModel(tr.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.tensor([[1, 2, 3]])
    model: Any = split(net, plan("transformer.h.1.mlp.c_fc"), sample={"input_ids": ids})
    with pytest.raises(SplitError, match=r"generate\(\).*rm\.view\(model, task\)\.module\.generate"):
        model.generate(ids, max_new_tokens=2)
    for name in ("save_pretrained", "push_to_hub"):
        with pytest.raises(SplitError, match=r"rm\.view\(model, task\)\.module"):
            getattr(model, name)("somewhere")
    assert type(net).generate is cast(Any, type(view(model, "a").module)).generate  # views and the original keep theirs

    class Own(nn.Linear):
        def generate(self) -> str:
            return "the user's"

    assert cast(Any, split(Own(2, 2), plan("(root)"))).generate() == "the user's"
