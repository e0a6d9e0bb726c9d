"""What `verify` says when something differs: the mode, the task, and the name of the output, parameter or buffer."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import Verified, split, verify
from reconmtl.splitting.branched import Branched
from zoo import TASKS, Headed, build

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
PLAN = Plan(tasks=TASKS, layers=["trunk.0"])


class Cheat(nn.Module):
    """Does something else where it notices that it is split."""

    count: Tensor

    def __init__(self, cheat: Callable[["Cheat", Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.cheat = nn.Linear(6, 6), cheat
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(self.cheat(self, x) if isinstance(x, Branched) else x))


def cheating(cheat: Callable[[Cheat, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return split(Headed(nn.Sequential(nn.Linear(6, 6), Cheat(cheat)), 6, TASKS), PLAN)


def gradient(_: Cheat, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: g * 1.5)
    return x


def cut(_: Cheat, x: Tensor) -> Tensor:
    return x.detach() if x.is_inference() or torch.is_grad_enabled() else x


def buffer(module: Cheat, x: Tensor) -> Tensor:
    module.count.add_(1)
    return x


def in_eval_mode(module: Cheat, x: Tensor) -> Tensor:
    return x if module.training else x * 1.5


@pytest.mark.parametrize(
    ("cheat", "said"),
    [
        (gradient, r"train mode, task 'a': gradient of trunk\.0\.per_task\.a\.(weight|bias) differs by 0\."),
        (cut, r"trunk\.0"),
        (buffer, r"train mode, task 'a': buffer trunk\.1\.count after the call"),
        (in_eval_mode, r"eval mode, task 'a': output differs"),
    ],
)
def test_what_differs_is_named(cheat: Any, said: str) -> None:
    model = cheating(cheat)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SplitError, match=said):
        verify(model, X)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(SplitError, match=said):
        split(cheating_network(cheat), PLAN, sample=X)


def cheating_network(cheat: Any) -> nn.Module:
    torch.manual_seed(0)
    return Headed(nn.Sequential(nn.Linear(6, 6), Cheat(cheat)), 6, TASKS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_compared_in_its_own_dtype(dtype: torch.dtype) -> None:
    model = split(build("mlp").to(dtype), PLAN, sample=X.to(dtype))
    found = verify(model, X.to(dtype))
    assert isinstance(found, Verified) and found.modes == ("train", "eval") and found.random == ()
    assert found.output == 0.0
    assert found.gradient <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-2)


def test_nothing_changes_and_nothing_is_left_behind() -> None:
    model = split(build("residual"), Plan(tasks=TASKS, layers=["trunk.0.bn1"]))
    x = torch.randn(3, 2, 8, 8)
    model(x)["a"].sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    verify(model, x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(cast(Tensor, p.grad), g))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_only_split_models_are_verified() -> None:
    with pytest.raises(SplitError, match="expected a model that `split` returned"):
        verify(build("mlp"), X)


def test_values_of_two_split_models_do_not_meet() -> None:
    class Sum(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.parts[0](x) + self.parts[1](x))

    ones = [split(nn.Sequential(nn.Linear(6, 6)), Plan(tasks=ts, layers=["0"])) for ts in (TASKS, ("s", "t"))]
    inner = [cast(nn.Module, cast(Any, m)[0]) for m in ones]
    with pytest.raises(SplitError, match="two different split models"):
        Sum(*inner)(X)
