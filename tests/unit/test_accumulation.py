import copy

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import ProbeError
from reconmtl.probing import Probe


def _losses(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return {t: ((o - (i + 1) * x[:, i]) ** 2).mean() for i, (t, o) in enumerate(outputs.items())}


def _batches(steps: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(16, 5, generator=draw, dtype=dtype) for _ in range(steps)]


class Scales(nn.Module):
    """Nothing in it mixes samples, so that a batch may come in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, sparse=True)
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in "abc"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = x + self.embed((x[:, 0] * 3).abs().long() % 7)
        z = torch.tanh(self.second(torch.tanh(self.norm(self.first(z)))))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


@pytest.mark.parametrize("exact", [False, True])
def test_micro_batches_give_the_gram_and_the_gradient_of_the_whole_batch(exact: bool) -> None:
    """One micro-batch has no target for a task, so that what is shared differs between the graphs."""
    torch.manual_seed(0)
    model = Scales().double()
    twins = [copy.deepcopy(model) for _ in range(2)]
    whole, pieces, each = Probe(model), Probe(twins[0], exact=exact), Probe(twins[1])
    for x in _batches(3, torch.float64):
        parts = x.split(4)
        losses = _losses(model(x), x)
        without = [p for i, p in enumerate(parts) if i != 1]
        losses["b"] = torch.stack([_losses(model(p), p)["b"] for p in without]).sum() / 4
        losses["c"] = torch.stack([_losses(model(p), p)["c"] for p in without]).sum() / 4
        whole.backward(losses)
        for i, part in enumerate(parts):
            losses = {t: v / 4 for t, v in _losses(twins[0](part), part).items() if i != 1 or t == "a"}
            pieces.backward(losses, last=i == 3)
            each.backward({t: v / 4 for t, v in _losses(twins[1](part), part).items()})
    assert (whole.log.steps, pieces.log.steps, each.log.steps) == (3, 3, 12)
    assert pieces.log.layers == whole.log.layers
    torch.testing.assert_close(pieces.log.grams, whole.log.grams, rtol=1e-10, atol=1e-16)
    for p, q in zip(model.parameters(), twins[0].parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.is_sparse == q.grad.is_sparse
        torch.testing.assert_close(q.grad.to_dense(), p.grad.to_dense(), rtol=1e-10, atol=1e-14)


def test_micro_batches_belong_to_one_step_of_the_schedule_and_a_failure_ends_it() -> None:
    torch.manual_seed(0)
    model = Scales()
    probe = Probe(model, every=2)
    (x,) = _batches(1, torch.float32)
    for _ in range(4):
        for last in (False, False, True):
            probe.backward(_losses(model(x), x), last=last)
    assert probe.log.steps == 2
    probe.backward(_losses(model(x), x), last=False)
    with pytest.raises(ProbeError, match="expected a scalar"):
        probe.backward(model(x))
    probe.backward(_losses(model(x), x), last=True)  # the end of the step that has begun, which is measured
    assert probe.log.steps == 3
    probe.backward(_losses(model(x), x), last=True)  # not measured
    probe.backward(_losses(model(x), x), last=False)
    losses = _losses(model(x), x)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="second time"):
        probe.backward(losses, last=True)
    assert probe.log.steps == 3
    with pytest.raises(ProbeError, match="pass `every` instead"):
        Probe(model, overhead=0.1).backward(_losses(model(x), x), last=False)
