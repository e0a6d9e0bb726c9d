import copy

import pytest
import torch
from torch import nn

from reconmtl.balance import Balancer
from reconmtl.balancers import BALANCERS
from reconmtl.errors import ProbeError
from reconmtl.probing import Probe
from stepping import Scales, step_batches, step_losses


@pytest.mark.parametrize("exact", [False, True])
def test_micro_batches_give_the_gram_and_the_gradient_of_the_whole_batch(exact: bool) -> None:
    """One micro-batch has no target for a task, so that what is shared differs between the graphs."""
    torch.manual_seed(0)
    model = Scales().double()
    twins = [copy.deepcopy(model) for _ in range(2)]
    whole, pieces, each = Probe(model), Probe(twins[0], exact=exact), Probe(twins[1])
    for x in step_batches(3, torch.float64):
        parts = x.split(4)
        losses = step_losses(model(x), x)
        without = [p for i, p in enumerate(parts) if i != 1]
        losses["b"] = torch.stack([step_losses(model(p), p)["b"] for p in without]).sum() / 4
        losses["c"] = torch.stack([step_losses(model(p), p)["c"] for p in without]).sum() / 4
        whole.backward(losses)
        for i, part in enumerate(parts):
            losses = {t: v / 4 for t, v in step_losses(twins[0](part), part).items() if i != 1 or t == "a"}
            pieces.backward(losses, last=i == 3)
            each.backward({t: v / 4 for t, v in step_losses(twins[1](part), part).items()})
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
    (x,) = step_batches(1, torch.float32)
    for _ in range(4):
        for last in (False, False, True):
            probe.backward(step_losses(model(x), x), last=last)
    assert probe.log.steps == 2
    probe.backward(step_losses(model(x), x), last=False)
    with pytest.raises(ProbeError, match="expected a scalar"):
        probe.backward(model(x))
    probe.backward(step_losses(model(x), x), last=True)  # the end of the step that has begun, which is measured
    assert probe.log.steps == 3
    probe.backward(step_losses(model(x), x), last=True)  # not measured
    probe.backward(step_losses(model(x), x), last=False)
    losses = step_losses(model(x), x)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="second time"):
        probe.backward(losses, last=True)
    assert probe.log.steps == 3
    with pytest.raises(ProbeError, match="pass `every` instead"):
        Probe(model, overhead=0.1).backward(step_losses(model(x), x), last=False)


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("spec", sorted({*BALANCERS} - {"joint", "rgw", "rlw"}))
def test_balancers_act_on_the_accumulated_gradients(spec: str, start: int) -> None:
    """Two steps in four micro-batches, one without two of the tasks, are those of the whole batch."""
    torch.manual_seed(0)
    model = Scales().double()
    twin = copy.deepcopy(model)
    optimizers, probes = [], []
    for net in (model, twin):
        probes.append(Probe(net, balancer=Balancer(spec, "abc"), start=start))
        embedding = list(net.embed.parameters())
        dense = [p for n, p in net.named_parameters() if n != "embed.weight"]
        assert probes[-1].balancer is not None
        optimizers.append(torch.optim.SGD([*dense, *embedding, *probes[-1].balancer.parameters()], lr=0.01))
    for x in step_batches(2, torch.float64):
        x = x.round(decimals=1)
        parts = x.split(4)
        losses = step_losses(model(x), x)
        without = [p for i, p in enumerate(parts) if i != 1]
        for t in "bc":
            losses[t] = torch.stack([step_losses(model(p), p)[t] for p in without]).sum() / 4
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(1)
        probes[0].backward(losses)
        for i, part in enumerate(parts):
            assert i == 0 or twin.first.weight.grad is None  # everything comes with the last one
            some = {t: v / 4 for t, v in step_losses(twin(part), part).items() if i != 1 or t == "a"}
            torch.manual_seed(1)
            probes[1].backward(some, last=i == 3)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.is_sparse == q.grad.is_sparse
            torch.testing.assert_close(q.grad.to_dense(), p.grad.to_dense(), rtol=1e-7, atol=1e-11, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    learned = [[p.detach() for p in probe.balancer.parameters()] for probe in probes]  # type: ignore[union-attr]
    torch.testing.assert_close(learned[0], learned[1])
    if not start:
        torch.testing.assert_close(probes[1].log.grams, probes[0].log.grams, rtol=1e-9, atol=1e-14)


def test_what_no_micro_batch_has_stays_without_a_gradient_and_other_leaves_get_theirs() -> None:
    torch.manual_seed(0)
    model, outer = Scales().double(), torch.ones((), dtype=torch.float64, requires_grad=True)
    model.unused = nn.Linear(2, 2).double()
    (x,) = step_batches(1, torch.float64)
    probe = Probe(model, balancer="mgda")
    for i, part in enumerate(x.split(8)):
        probe.backward({t: v * outer for t, v in step_losses(model(part), part).items()}, last=i == 1)
    expected = sum(float(v.detach()) for part in x.split(8) for v in step_losses(model(part), part).values())
    assert outer.grad is not None
    assert float(outer.grad) == pytest.approx(expected)
    assert model.unused.weight.grad is None


def test_a_scaled_loss_and_methods_that_need_one_graph() -> None:
    torch.manual_seed(0)
    model = Scales()
    (x,) = step_batches(1, torch.float32)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model.zero_grad()
        probe = Probe(model, balancer="cagrad:c=0.4")
        for i, part in enumerate(x.split(8)):
            probe.backward(step_losses(model(part), part), scaler=scaler, last=i == 1)
        found.append({n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name] / 1024, grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ProbeError, match=r"MGDA .* does not go with micro-batches"):
        Probe(model, balancer="mgda:at=features").backward(step_losses(model(x), x), last=False)
