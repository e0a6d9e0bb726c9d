import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import LayerMatchError, OptimizerError, SplitError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting import check_optimizer, cost, split, split_optimizer
from zoo import TASKS, build

X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLAN = Plan(tasks=TASKS, layers={"trunk.0.conv2": [["a", "b"], ["c"]], "trunk.1.bn1": [["a"], ["b"], ["c"]]})


def loss(model: nn.Module, task: str | None = None) -> Tensor:
    out = model(X)
    return torch.stack([out[t].square().mean() for t in TASKS if task in (None, t)]).sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def net() -> nn.Module:
    return build("residual").double()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_carried_over_optimizer_goes_on_as_one_per_task_would(name: str) -> None:
    model = net()
    groups = [{"params": [p]} for p in model.parameters()]
    groups[0]["lr"] = cast(Any, 1e-3)
    optimizer = OPTIMIZERS[name](groups)
    for _ in range(3):
        step(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    new = split(model, PLAN, sample=X)
    carried = split_optimizer(optimizer, model, new)
    check_optimizer(new, carried)
    assert type(carried) is type(optimizer)
    assert carried.param_groups[0]["lr"] == 1e-3
    assert {k: v for k, v in carried.param_groups[1].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[1].items() if k != "params"
    }
    # task b alone, from here: its copies go on exactly as the shared layers of a network of its own
    alone = copy.deepcopy(model)
    own = OPTIMIZERS[name](
        [{"params": [p], "lr": g["lr"]} for p, g in zip(alone.parameters(), optimizer.param_groups, strict=True)]
    )
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((new, carried), (alone, own)):
        for _ in range(3):
            o.zero_grad()
            loss(m, "b").backward()
            o.step()
    mine = dict(new.named_parameters())
    for key, p in alone.named_parameters():
        owner, _, last = key.rpartition(".")
        found = next(mine[k] for k in (key, f"{owner}.per_task.b.{last}", f"{owner}.per_task.a+b.{last}") if k in mine)
        torch.testing.assert_close(found, p, rtol=1e-10, atol=1e-12)
    for a, b in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_an_optimizer_of_the_unsplit_model_is_refused_by_name() -> None:
    model = net()
    new = split(model, PLAN)
    with pytest.raises(OptimizerError, match=r"trunk\.0\.conv2\.per_task\.c\.weight.*split_optimizer"):
        check_optimizer(new, torch.optim.SGD(model.parameters(), lr=0.1))
    good = torch.optim.SGD(new.parameters(), lr=0.1)
    check_optimizer(new, good)
    good.add_param_group({"params": [nn.Parameter(torch.zeros(5, 7))]})
    with pytest.raises(OptimizerError, match=r"\(5, 7\)"):
        check_optimizer(new, good)
    with pytest.raises(OptimizerError, match="before the split"):
        split_optimizer(good, model, new)
    with pytest.raises(OptimizerError, match="LBFGS"):
        split_optimizer(torch.optim.LBFGS(model.parameters()), model, new)
    with pytest.raises(SplitError, match="another model"):
        other = build("mlp")
        split_optimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, new)


def test_frozen_parameters_need_no_optimizer() -> None:
    new = split(net(), PLAN)
    cast(Any, new).trunk[0].requires_grad_(False)
    check_optimizer(new, torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.1))


@pytest.mark.parametrize("name", ["residual", "tokens", "lstm", "tied", "reused"])
def test_cost_is_what_the_split_model_has(name: str) -> None:
    model = build(name)
    layers = [x.name for x in find_layers(model) if not x.name.startswith("heads")]
    layers += ["trunk.out"] if name == "tied" else []
    plan = Plan(tasks=TASKS, layers={n: [["a", "c"], ["b"]] for n in layers})
    expected = sum(p.numel() for p in split(model, plan).parameters())
    assert cost(model, plan).parameters == cost(split(model, plan)).parameters == expected
    assert cost(model, plan).megabytes == expected * 4 / 2**20
    assert cost(model).parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(LayerMatchError):
        cost(model, Plan(tasks=TASKS, layers=["nothing"]))
    with pytest.raises(SplitError, match="already"):
        cost(split(model, plan), plan)
