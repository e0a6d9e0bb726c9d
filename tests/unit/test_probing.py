import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.errors import ProbeError, UnknownNameError
from reconmtl.layers import find_layers, match_layers
from reconmtl.networks import resnet
from reconmtl.probing import Probe
from reconmtl.recording import CHUNK


class Small(nn.Module):
    """Batch statistics, random masks and an unused parameter: everything a second look could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1), "c": nn.Linear(8, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.second(self.drop(torch.relu(self.norm(self.first(x)))))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


def _losses(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    flat = x.flatten(1)
    return {
        t: ((o.reshape(len(o), -1).sum(1) - (i + 1) * flat[:, i]) ** 2).mean()
        for i, (t, o) in enumerate(outputs.items())
    }


def _train(model: nn.Module, batches: list[Tensor], probe: Probe | None) -> tuple[dict[str, Any], Tensor]:
    """Plain SGD steps, probed or not; returns the state and the random state afterwards."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x in batches:
        losses = _losses(model(x), x)
        optimizer.zero_grad()
        if probe is None:
            sum(losses.values()).backward()  # type: ignore[union-attr]
        else:
            probe.backward(losses)
        optimizer.step()
    return copy.deepcopy(model.state_dict()), torch.get_rng_state()


def _batches(steps: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(16, 5, generator=draw, dtype=dtype) for _ in range(steps)]


def test_fifty_probed_steps_in_float64_equal_plain_training() -> None:
    torch.manual_seed(0)
    model = Small().double()
    twin = copy.deepcopy(model)
    batches = _batches(50, torch.float64)
    plain, random = _train(model, batches, None)
    probed, random_probed = _train(twin, batches, Probe(twin))
    for name, value in plain.items():
        torch.testing.assert_close(probed[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(random, random_probed)
    assert all(torch.equal(probed[n], plain[n]) for n in plain if "num_batches" in n)


@pytest.mark.parametrize("network", ["small", "resnet"])
def test_one_probed_step_in_float32_equals_a_plain_one(network: str) -> None:
    torch.manual_seed(0)
    model = Small() if network == "small" else resnet.multifashion(width=8)
    x = _batches(1, torch.float32)[0] if network == "small" else torch.rand(16, 1, 36, 36)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    sum(_losses(model(x), x).values()).backward()  # type: ignore[union-attr]
    torch.manual_seed(1)
    Probe(twin).backward(_losses(twin(x), x))
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None
        else:
            assert q.grad is not None
            # a bias before a BatchNorm has a gradient of rounding noise only, hence the part of the whole gradient
            assert (p.grad - q.grad).norm() <= 1e-5 * p.grad.norm() + 1e-7 * whole, name
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c), name


def test_exact_is_bit_equal_in_float32() -> None:
    torch.manual_seed(0)
    model = Small()
    twin = copy.deepcopy(model)
    batches = _batches(20, torch.float32)
    plain, random = _train(model, batches, None)
    probe = Probe(twin, exact=True)
    probed, random_probed = _train(twin, batches, probe)
    for name, value in plain.items():
        assert torch.equal(probed[name], value), name
    assert torch.equal(random, random_probed)
    assert probe.log.steps == 20


def test_gradients_accumulate_as_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    twin = copy.deepcopy(model)
    probe = Probe(twin)
    for x in _batches(3, torch.float64):
        sum(_losses(model(x), x).values()).backward()  # type: ignore[union-attr]
        probe.backward(_losses(twin(x), x))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-14)


def test_every_measures_one_of_m_steps_and_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model = Small().double()
    twin = copy.deepcopy(model)
    batches = _batches(10, torch.float64)
    plain, _ = _train(model, batches, None)
    probe = Probe(twin, every=4)
    probed, _ = _train(twin, batches, probe)
    assert probe.log.steps == 3
    assert probe.log.every == 4
    for name, value in plain.items():
        torch.testing.assert_close(probed[name], value, rtol=1e-10, atol=1e-12)


def test_the_log_is_the_same_however_it_was_buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = []
    for chunk in (CHUNK, 3):
        monkeypatch.setattr("reconmtl.recording.CHUNK", chunk)
        torch.manual_seed(0)
        model = Small()
        probe = Probe(model)
        _train(model, _batches(8, torch.float32), probe)
        logs.append(probe.log.grams)
    assert torch.equal(*logs)


def test_a_task_that_is_absent_from_a_step_is_nan_there() -> None:
    torch.manual_seed(0)
    model = Small()
    probe = Probe(model)
    for step, x in enumerate(_batches(3, torch.float32)):
        losses = _losses(model(x), x)
        if step == 0:
            del losses["a"]  # the first step knows of two tasks only
        if step == 2:
            del losses["b"]
        probe.backward(losses)
    log = probe.log
    assert log.tasks == ("b", "c", "a")
    assert log.pairs == [("b", "c"), ("b", "a"), ("c", "a")]
    present = ~log.cosines().isnan().all(1)
    assert present.tolist() == [[True, False, False], [True, True, True], [False, False, True]]


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = Small()
    before = set(vars(model)), {n: set(vars(m)) for n, m in model.named_modules()}
    probe = Probe(model)
    x = _batches(1, torch.float32)[0]
    with pytest.raises(ProbeError):
        probe.backward({"a": model(x)["a"]})  # not a scalar
    with pytest.raises(RuntimeError, match="second time"):
        losses = _losses(model(x), x)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        probe.backward(losses)
    probe.backward(_losses(model(x), x))
    assert (set(vars(model)), {n: set(vars(m)) for n, m in model.named_modules()}) == before
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(not p._backward_hooks and not vars(p) for p in model.parameters())
    losses = _losses(model(x), x)
    probe.backward(losses)
    graph = [weakref.ref(loss) for loss in losses.values()]
    del losses
    assert [ref() for ref in graph] == [None] * 3


def test_check_agrees_with_the_oracle_and_leaves_gradients_alone() -> None:
    torch.manual_seed(0)
    model = Small().double()
    x = _batches(1, torch.float64)[0]
    losses = _losses(model(x), x)
    probe = Probe(model)
    assert probe.check(losses) < 1e-12
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ProbeError, match="Nothing has been recorded"):
        probe.log  # noqa: B018
    probe.backward(losses)  # the graph is still there
    assert probe.log.steps == 1


def test_check_finds_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Small()
    x = _batches(1, torch.float32)[0]

    monkeypatch.setattr("reconmtl.passes.torch.Tensor.addmm_", lambda g, a, b: g.add_((a.flip(0) + a[0]) @ b))
    with pytest.raises(ProbeError, match="differs from the oracle's"):
        Probe(model).check(_losses(model(x), x))


def test_infinite_gradients_are_reported_not_counted() -> None:
    model = nn.Linear(3, 2)
    probe = Probe(model)
    out = model(torch.ones(4, 3))
    probe.backward({"a": out.sum(), "b": out.sum() * float("inf")})
    with pytest.raises(ProbeError, match=r"task 'b' at layer '\(root\)' is not finite"):
        probe.log  # noqa: B018


def test_nothing_shared_is_an_error_not_an_empty_log() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    probe = Probe(model)
    probe.backward({t: m(torch.ones(3, 2)).mean() for t, m in model.items()})
    with pytest.raises(ProbeError, match="nothing shared"):
        probe.log  # noqa: B018


def test_wrong_arguments_are_named() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UnknownNameError, match="Nearest: 'flat'"):
        Probe(model, engine="flatt")  # type: ignore[arg-type]
    with pytest.raises(ProbeError, match="every = 0"):
        Probe(model, every=0)
    with pytest.raises(ProbeError, match="task: scalar tensor"):
        Probe(model).backward({})


def test_copies_of_a_split_model_are_measured_only_where_they_are_shared() -> None:
    torch.manual_seed(0)
    model = Small().double()
    plan = rm.Plan(tasks=["a", "b", "c"], layers={"first": [["a", "c"], ["b"]], "second": [["a"], ["b"], ["c"]]})
    x = _batches(1, torch.float64)[0]
    probe = Probe(rm.split(model, plan, sample=x))
    probe.backward(_losses(probe._gradients.model(x), x))
    assert probe.log.layers == ("first[a+c]", "norm")
    pairs = dict(zip(probe.log.pairs, probe.log.cosines()[0, 0].tolist(), strict=True))
    assert [pair for pair, cosine in pairs.items() if cosine == cosine] == [("a", "c")]
    assert probe.log.cosines()[0, 1].isfinite().all()


def test_a_budget_of_time_measures_some_steps_and_trains_the_same() -> None:
    models = []
    for overhead in (None, 0.1):
        torch.manual_seed(0)
        model = Small()
        probe = Probe(model, overhead=overhead) if overhead else Probe(model)
        _train(model, _batches(12, torch.float32), probe)
        models.append([p.detach().clone() for p in model.parameters()])
        assert probe.log.steps == 12 if overhead is None else 2 <= probe.log.steps < 12
        assert probe.log.every == probe.every
    for a, b in zip(*models, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["auto", "flat", "delta"])
@pytest.mark.parametrize("split", [["conv1"], ["conv1", "bn1", "layer2.*"], ["layer3.0.conv1"], ["*1", "fc"]])
def test_layers_that_stay_shared_behind_a_split_equal_the_oracle(split: list[str], engine: Any) -> None:
    torch.manual_seed(0)
    model = resnet.multifashion(width=4).double()
    names = [n for n in match_layers(split, [x.name for x in find_layers(model)]) if "heads" not in n]
    new = rm.split(model, rm.Plan(tasks=["digit", "fashion"], layers=names))
    x = torch.rand(8, 1, 36, 36, dtype=torch.float64)
    twin = copy.deepcopy(new)
    probe = Probe(new, engine=engine)
    losses = _losses(new(x), x)
    assert probe.check(losses) < 1e-10
    probe.backward(losses)
    sum(_losses(twin(x), x).values()).backward()  # type: ignore[union-attr]
    assert not set(names) & set(probe.log.layers)
    assert len(probe.log.layers) == 41 - len(names)
    for (name, p), q in zip(twin.named_parameters(), new.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
