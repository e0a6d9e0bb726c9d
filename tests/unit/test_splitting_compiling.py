"""torch.compile on, in and around a split model: right, or refused with a sentence of our own."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import split, view
from zoo import TASKS, build

X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def plan(*layers: str) -> Plan:
    return Plan(tasks=TASKS, layers=layers or ("trunk.1.conv1",))


@pytest.fixture(autouse=True)
def graphs() -> Iterator[list[Any]]:
    """Compilers start anew; what `counting` has compiled."""
    torch.compiler.reset()
    GRAPHS.clear()
    yield GRAPHS
    torch.compiler.reset()


GRAPHS: list[Any] = []


def counting(graph: Any, _: Any) -> Any:
    GRAPHS.append(graph)
    return graph


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def agree(call: Callable[[Tensor], Any], model: nn.Module, twin: nn.Module) -> None:
    """Two steps of a compiled model give outputs, gradients and buffers of one that is not."""
    for _ in range(2):
        outs = call(X), twin(X)
        assert all(torch.equal(outs[0][t], outs[1][t]) for t in TASKS)
        for out, m in zip(outs, (model, twin), strict=True):
            m.zero_grad()
            torch.stack([(i + 1) * out[t].square().mean() for i, t in enumerate(TASKS)]).sum().backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=n)
    mine, theirs = dict(model.named_buffers()), dict(twin.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", ["whole", "in place", "in a function"])
def test_a_compiled_split_model_is_right_before_and_after_a_verified_call(how: str, called: bool) -> None:
    model: Any = split(build("residual"), plan(), sample=X if called else None)
    perturb(model)
    twin = copy.deepcopy(model)
    call: Any = model
    if how == "whole":
        call = torch.compile(model, backend=counting)
    elif how == "in place":
        model.compile(backend=counting)
    else:

        def scaled(x: Tensor) -> Any:
            return model(x * 1)

        call = torch.compile(scaled, backend=counting)
    agree(call, model, twin)


@pytest.mark.parametrize("called", [False, True])
def test_one_graph_of_a_split_model_is_refused_with_the_way_out(called: bool, graphs: list[Any]) -> None:
    model = split(build("residual"), plan(), sample=X if called else None)
    twin = copy.deepcopy(model)
    for compiled in (
        torch.compile(model, backend=counting, fullgraph=True),
        torch.compile(lambda x: model(x * 1)["a"], backend=counting, fullgraph=True),
    ):
        with pytest.raises(SplitError, match=r"rm\.view\(model, task\), fullgraph=True"):
            cast(Any, compiled)(X)
    with pytest.raises(SplitError, match=r"rm\.view"):
        model.compile(fullgraph=True)
    assert not graphs
    agree(model, model, twin)  # nothing is left behind
    one = torch.compile(view(model.eval(), "b"), backend=counting, fullgraph=True)
    assert torch.equal(one(X)["b"], model(X)["b"])
    assert len(graphs) == 1


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_what_comes_before_the_split_compiles_into_one_graph(how: str, graphs: list[Any]) -> None:
    model = split(build("residual"), plan(), sample=X)
    perturb(model)
    twin = copy.deepcopy(model)
    trunk = cast(Any, model).trunk
    if how == "wrapped":
        whole = torch.compile(trunk[0], backend=counting, fullgraph=True)
        names = {n.replace("trunk.0._orig_mod", "trunk.0"): n for n, _ in model.named_parameters()}
        trunk[0] = whole
        assert len(names) == len(list(twin.parameters()))
        out, expected = model(X), twin(X)
        assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    else:
        trunk[0].compile(backend=counting, fullgraph=True)
        agree(model, model, twin)
    assert len(graphs) == 1  # one graph, compiled once


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("layer", ["trunk.0.conv2", "trunk.1.conv1"], ids=["values reach it", "layers in it"])
def test_a_compiled_part_that_tasks_would_go_through_is_refused_by_name(layer: str, how: str, fullgraph: bool) -> None:
    model = split(build("residual"), plan(layer), sample=X)
    trunk = cast(Any, model).trunk
    if how == "wrapped":
        trunk[1] = torch.compile(trunk[1], backend="eager", fullgraph=fullgraph)
    else:
        trunk[1].compile(backend="eager", fullgraph=fullgraph)
    with pytest.raises(SplitError, match=r"^trunk\.1.* torch\.compile cannot trace.*rm\.view"):
        model(X)


def test_a_split_layer_that_is_compiled_itself_runs_as_it_is() -> None:
    model = split(build("residual"), plan(), sample=X)
    perturb(model)
    twin = copy.deepcopy(model)
    cast(Any, model).trunk[1].conv1.compile(backend="eager", fullgraph=True)
    agree(model, model, twin)


def test_a_part_compiled_before_the_split() -> None:
    net = build("residual")
    expected = {t: copy.deepcopy(net)(X)[t] for t in TASKS}
    cast(Any, net).trunk[1].compile(backend="eager")  # copies of a model do not take this along
    out = split(net, plan(), sample=X)(X)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS)
    cast(Any, net).trunk[1] = torch.compile(cast(Any, net).trunk[1], backend="eager")
    with pytest.raises(SplitError, match=r"trunk\.1 is wrapped by torch\.compile: split first"):
        split(net, plan("trunk.0.conv1"))
