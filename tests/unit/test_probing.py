import copy
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import reconmtl as rm
from reconmtl.errors import ProbeError, UnknownNameError
from reconmtl.layers import find_layers, match_layers
from reconmtl.networks import resnet
from reconmtl.probing import Engine, Probe
from reconmtl.recording import CHUNK
from stepping import Scales, step_batches, step_losses


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


def _train(model: nn.Module, batches: list[Tensor], probe: Probe | None) -> tuple[dict[str, Any], Tensor]:
    """Plain SGD steps, probed or not; returns the state and the random state afterwards."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x in batches:
        losses = step_losses(model(x), x)
        optimizer.zero_grad()
        if probe is None:
            sum(losses.values()).backward()  # type: ignore[union-attr]
        else:
            probe.backward(losses)
        optimizer.step()
    return copy.deepcopy(model.state_dict()), torch.get_rng_state()


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_fifty_probed_steps_in_float64_equal_plain_training(engine: Engine) -> None:
    torch.manual_seed(0)
    model = Small().double()
    twin = copy.deepcopy(model)
    batches = step_batches(50, torch.float64)
    plain, random = _train(model, batches, None)
    probe = Probe(twin, engine=engine)
    probed, random_probed = _train(twin, batches, probe)
    assert probe.engines["second"].startswith(engine)
    for name, value in plain.items():
        torch.testing.assert_close(probed[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(random, random_probed)
    assert all(torch.equal(probed[n], plain[n]) for n in plain if "num_batches" in n)


@pytest.mark.parametrize("engine", ["flat", "delta"])
@pytest.mark.parametrize("network", ["small", "resnet"])
def test_one_probed_step_in_float32_equals_a_plain_one(network: str, engine: Engine) -> None:
    torch.manual_seed(0)
    model = Small() if network == "small" else resnet.multifashion(width=8)
    x = step_batches(1, torch.float32)[0] if network == "small" else torch.rand(16, 1, 36, 36)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    sum(step_losses(model(x), x).values()).backward()  # type: ignore[union-attr]
    torch.manual_seed(1)
    Probe(twin, engine=engine).backward(step_losses(twin(x), x))
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


def test_the_update_is_that_of_plain_passes_task_by_task_and_no_further_from_the_truth() -> None:
    """Summing losses before or after backpropagation rounds differently; that is all the probe changes.

    The truth is the same step in float64. The network is smooth: behind a ReLU one sign that differs between float32
    and float64 moves a gradient more than all rounding does, in plain training as well.
    """
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((1, 8), (8, 16), (16, 32))]
    trunk = nn.Sequential(*(m for c in convolutions for m in (c, nn.BatchNorm2d(c.out_channels), nn.Tanh())))
    model, x = nn.Sequential(trunk, nn.Flatten(), nn.Linear(512, 3)), torch.rand(16, 1, 32, 32)

    def gradients(dtype: torch.dtype, how: str) -> list[Tensor]:
        twin = copy.deepcopy(model).to(dtype)
        out = twin(x.to(dtype))
        losses = step_losses({t: out[:, i] for i, t in enumerate("abc")}, x.to(dtype))
        if how == "joint":
            sum(losses.values()).backward()  # type: ignore[union-attr]
        elif how == "by task":
            for loss in losses.values():
                loss.backward(retain_graph=True)
        else:
            Probe(twin, engine=how).backward(losses)  # type: ignore[arg-type]
        return [p.grad.double() for p in twin.parameters() if p.grad is not None]

    truth, joint, by_task = (
        gradients(d, h) for d, h in ((torch.float64, "joint"), (torch.float32, "joint"), (torch.float32, "by task"))
    )
    whole = torch.cat([g.flatten() for g in truth]).norm()
    for engine in ("flat", "delta"):
        for p, t, j, b in zip(gradients(torch.float32, engine), truth, joint, by_task, strict=True):
            noise = 3e-7 * whole  # a bias in front of a BatchNorm
            assert (p - b).norm() <= 1e-6 * b.norm() + noise
            assert (p - j).norm() <= 2e-6 * j.norm() + noise
            assert (p - t).norm() <= 1.5 * (j - t).norm() + 1e-7 * t.norm() + noise


@pytest.mark.slow
def test_on_resnet18_at_full_width_the_update_differs_from_a_joint_pass_as_two_plain_passes_do() -> None:
    """There the first convolution differs by 2.7e-6: it sums over 5,184 pixels, and cancels."""
    torch.manual_seed(0)
    model, x = resnet.multifashion(), torch.rand(16, 1, 36, 36)

    def gradients(how: str) -> dict[str, Tensor]:
        twin = copy.deepcopy(model)
        probe = Probe(twin, engine=how) if how in ("flat", "auto", "delta") else None  # type: ignore[arg-type]
        for _ in range(2):  # the first measured step also compares the engines
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            losses = step_losses(twin(x), x)
            if probe is not None:
                probe.backward(losses)
            elif how == "joint":
                sum(losses.values()).backward()  # type: ignore[union-attr]
            else:
                for loss in losses.values():
                    loss.backward(retain_graph=True)
        return {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}

    def distances(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[float]:
        return [float((a[n] - b[n]).norm() / b[n].norm()) for n in b]

    joint, by_task = gradients("joint"), gradients("by task")
    expected = max(distances(by_task, joint))
    assert expected < 5e-6
    assert all(torch.equal(g, by_task[n]) for n, g in gradients("flat").items())
    for engine in ("auto", "delta"):
        found = gradients(engine)
        assert max(distances(found, by_task)) < 2e-6
        assert max(distances(found, joint)) < 1.1 * expected


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_exact_is_bit_equal_in_float32(engine: Engine) -> None:
    torch.manual_seed(0)
    model = Small()
    twin = copy.deepcopy(model)
    batches = step_batches(20, torch.float32)
    plain, random = _train(model, batches, None)
    probe = Probe(twin, exact=True, engine=engine)
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
    for x in step_batches(3, torch.float64):
        sum(step_losses(model(x), x).values()).backward()  # type: ignore[union-attr]
        probe.backward(step_losses(twin(x), x))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ["flat", "delta"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_gradient_scaler_changes_neither_update_nor_record_and_its_overflows_are_left_out(
    engine: Engine, pieces: int
) -> None:
    """Scales are powers of two, so that scaled and plain steps differ by nothing at all; the first ones overflow."""
    torch.manual_seed(0)
    plain = Scales()
    plain.embed = nn.Embedding(7, 5)
    probed, unscaled = copy.deepcopy(plain), copy.deepcopy(plain)
    probe, reference = Probe(probed, engine=engine), Probe(unscaled, engine=engine)
    batches = step_batches(8, torch.float32)
    skipped = []
    for model, watch in ((plain, None), (probed, probe)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-107, growth_interval=1000)
        for x in batches:
            optimizer.zero_grad()
            for i, part in enumerate(x.chunk(pieces)):
                losses = {t: 64 * v for t, v in step_losses(model(part), part).items()}
                if watch is not None:
                    watch.backward(losses, scaler=scaler, last=i == pieces - 1)
                else:
                    scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if watch is not None:
                skipped.append(scaler.get_scale() < before)
    for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
    assert sum(skipped) == probe.skipped == 1
    assert probe.log.steps == 7
    assert all(name.startswith("delta") == (engine == "delta") for k, name in probe.engines.items() if k == "second")
    optimizer = torch.optim.SGD(unscaled.parameters(), lr=0.01, momentum=0.9)
    for x, left_out in zip(batches, skipped, strict=True):
        if not left_out:
            optimizer.zero_grad()
            for i, part in enumerate(x.chunk(pieces)):
                losses = {t: 64 * v for t, v in step_losses(unscaled(part), part).items()}
                reference.backward(losses, last=i == pieces - 1)
            nn.utils.clip_grad_norm_(unscaled.parameters(), 0.5)
            optimizer.step()
    torch.testing.assert_close(probe.log.grams, reference.log.grams, rtol=1e-4, atol=1e-9)


def test_half_precision_with_a_scaler_trains_and_records() -> None:
    torch.manual_seed(0)
    model = Scales()
    model.embed = nn.Embedding(7, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    probe, total = Probe(model, engine="delta"), []
    (x,) = step_batches(1, torch.float32)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            outputs = model(x)
        losses = step_losses({t: o.float() for t, o in outputs.items()}, x)
        probe.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        total.append(sum(float(v.detach()) for v in losses.values()))
    assert probe.log.steps + probe.skipped == 30
    assert probe.skipped > 0
    assert probe.log.cosines().isfinite().all()
    assert total[-1] < 0.7 * total[0]
    losses = step_losses(model(x), x)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ProbeError, match="pass the losses unscaled"):  # nothing skips a step here: this is a fault
        probe.backward({t: v * float("inf") for t, v in losses.items()}, scaler=disabled)
        probe.log  # noqa: B018


def test_every_measures_one_of_m_steps_and_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model = Small().double()
    twin = copy.deepcopy(model)
    batches = step_batches(10, torch.float64)
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
        _train(model, step_batches(8, torch.float32), probe)
        logs.append(probe.log.grams)
    assert torch.equal(*logs)


def test_a_task_that_is_absent_from_a_step_is_nan_there() -> None:
    torch.manual_seed(0)
    model = Small()
    probe = Probe(model)
    for step, x in enumerate(step_batches(3, torch.float32)):
        losses = step_losses(model(x), x)
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


def test_a_lazy_model_is_measured_once_it_has_shapes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyConv1d(4, 2), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(6, 2, 5)
    model(x)
    out = model(x)
    probe = Probe(model)
    losses = {t: (out[:, i] * out[:, 2]).mean() for i, t in enumerate("ab")}
    assert probe.check(losses) < 5e-6
    probe.backward(losses)
    assert probe.log.layers == ("0", "1", "3")


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = Small()
    before = set(vars(model)), {n: set(vars(m)) for n, m in model.named_modules()}
    probe = Probe(model)
    x = step_batches(1, torch.float32)[0]
    with pytest.raises(ProbeError):
        probe.backward({"a": model(x)["a"]})  # not a scalar
    with pytest.raises(RuntimeError, match="second time"):
        losses = step_losses(model(x), x)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        probe.backward(losses)
    probe.backward(step_losses(model(x), x))
    assert (set(vars(model)), {n: set(vars(m)) for n, m in model.named_modules()}) == before
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(not p._backward_hooks and not vars(p) for p in model.parameters())
    losses = step_losses(model(x), x)
    probe.backward(losses)
    graph = [weakref.ref(loss) for loss in losses.values()]
    del losses
    assert [ref() for ref in graph] == [None] * 3


def test_check_agrees_with_the_oracle_and_leaves_gradients_alone() -> None:
    torch.manual_seed(0)
    model = Small().double()
    x = step_batches(1, torch.float64)[0]
    losses = step_losses(model(x), x)
    probe = Probe(model)
    assert probe.check(losses) < 1e-12
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ProbeError, match="Nothing has been recorded"):
        probe.log  # noqa: B018
    probe.backward(losses)  # the graph is still there
    assert probe.log.steps == 1


class Restless(nn.Module):
    """A checkpointed forward, run again in every backward pass, that changes statistics, a mode and random states."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)
        return {t: z[:, i] for i, t in enumerate("abc")}

    def inner(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach()
        self.drop.eval()
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002 the global states are what this is about
        y: Tensor = torch.tanh(self.drop(self.norm(self.first(x))))
        return y


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_check_restores_buffers_modes_and_random_states(engine: Engine) -> None:
    torch.manual_seed(0)
    model = Restless()
    x = step_batches(1, torch.float32)[0]
    losses = step_losses(model(x), x)
    model.drop.train()

    def state() -> tuple[Any, ...]:
        buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}
        modes = [m.training for m in model.modules()]
        return buffers, modes, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002

    before = state()
    assert Probe(model, engine=engine).check(losses) < 5e-6
    after = state()
    assert before[0].keys() == after[0].keys() == {"norm.running_mean", *before[0]}
    for name, (buffer, value) in before[0].items():
        assert after[0][name][0] is buffer
        assert torch.equal(after[0][name][1], value), name
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
    assert all(p.grad is None for p in model.parameters())
    assert int(model.calls) == 1
    Probe(model, engine=engine).backward(losses)
    assert int(model.calls) == 2  # as after one plain pass


def test_an_exception_in_the_users_forward_passes_through_and_the_next_step_is_right() -> None:
    torch.manual_seed(0)
    model, fails = Restless().double().eval(), [False]
    probe = Probe(model)
    inner = model.inner

    def failing(x: Tensor) -> Tensor:
        if fails[0]:
            raise ZeroDivisionError("of the user")
        return inner(x)

    model.inner = failing  # type: ignore[method-assign]
    x = step_batches(1, torch.float64)[0]
    probe.backward(step_losses(model(x), x))
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    losses = step_losses(model(x), x)
    fails[0] = True  # the forward that checkpointing runs again fails in the middle of the measurement
    with pytest.raises(ZeroDivisionError, match="of the user"):
        probe.backward(losses)
    fails[0] = False
    assert all(p.grad is None for p in model.parameters())
    probe.backward(step_losses(model(x), x))
    for p, e in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, e)
    assert torch.equal(probe.log.grams[0], probe.log.grams[1])


class Waits(TorchFunctionMode):
    """Counts what would have to wait for an accelerator: values that come to the CPU or decide what Python does."""

    def __init__(self) -> None:
        super().__init__()
        self.names = {"cpu", "item", "tolist", "numpy", "nonzero", "unique", "__bool__", "__float__", "__int__"}
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        options = kwargs or {}
        moved = name == "to" and "cpu" in map(str, (*args[1:], options.get("device"))) and "non_blocking" not in options
        listed = name in ("__getitem__", "__setitem__") and any(isinstance(i, (list, Tensor)) for i in _tuple(args[1]))
        if name in self.names or moved or listed:
            self.seen.append(name)
        return func(*args, **options)


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_an_accelerator_is_waited_for_once_per_chunk_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconmtl.recording.CHUNK", 8)
    torch.manual_seed(0)
    model = Small()
    model.middle = nn.Linear(8, 8)
    probe, counts = Probe(model, engine=engine), []
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for x in step_batches(26, torch.float32):
        out = model(x)
        out["c"] = out["c"] + model.middle(out["b"].new_ones(len(x), 8)).mean(1)  # a layer of two tasks
        out["b"] = out["b"] + model.middle(out["c"].new_zeros(len(x), 8)).mean(1)
        losses = step_losses(out, x)
        with Waits() as waits:
            probe.backward(losses, scaler=scaler)
        counts.append(len(waits.seen))
    # The first step compares the engines; steps 9, 17 and 25 hand eight Grams to the CPU.
    assert [n for n, c in enumerate(counts) if c and n] == [8, 16, 24]
    assert counts[8] <= 12
    assert "middle" in probe.log.layers


def test_check_finds_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Small()
    x = step_batches(1, torch.float32)[0]

    monkeypatch.setattr("reconmtl.passes.torch.Tensor.addmm_", lambda g, a, b: g.add_((a.flip(0) + a[0]) @ b))
    with pytest.raises(ProbeError, match="differs from the oracle's"):
        Probe(model).check(step_losses(model(x), x))


def test_check_finds_what_is_not_linear_in_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for bound in (1e9, 1e-3):
        z = model[0](torch.randn(5, 3))
        z.register_hook(lambda g, bound=bound: g.clamp(-bound, bound))
        out = model[1](z)
        losses = {"a": out[:, 0].pow(2).sum(), "b": (out[:, 1] - 1).pow(2).sum()}
        if bound > 1:
            Probe(model).check(losses)
        else:
            with pytest.raises(ProbeError, match=r"layer '0' do not add up .* exact=True"):
                Probe(model).check(losses)


def test_check_finds_a_gradient_that_was_taken_for_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    out = model(torch.randn(5, 3))
    monkeypatch.setattr("reconmtl.passes.torch.Tensor.addmm_", lambda g, *_: g.zero_())
    with pytest.raises(ProbeError, match="differs from the oracle's"):
        Probe(model, engine="flat").check({"a": out[:, 0].sum(), "b": out.sum()})


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
    x = step_batches(1, torch.float64)[0]
    probe = Probe(rm.split(model, plan, sample=x))
    probe.backward(step_losses(probe._gradients.model(x), x))
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
        _train(model, step_batches(12, torch.float32), probe)
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
    losses = step_losses(new(x), x)
    assert probe.check(losses) < 1e-10
    probe.backward(losses)
    sum(step_losses(twin(x), x).values()).backward()  # type: ignore[union-attr]
    assert not set(names) & set(probe.log.layers)
    assert len(probe.log.layers) == 41 - len(names)
    for (name, p), q in zip(twin.named_parameters(), new.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)


def _halves(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    first, second = (
        step_losses({t: o[part] for t, o in outputs.items()}, x[part]) for part in (slice(0, 8), slice(8, 16))
    )
    return {t: first[t] - second[t] for t in first}


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_a_null_holds_the_differences_between_halves_and_leaves_the_update_alone(engine: Engine) -> None:
    torch.manual_seed(0)
    model = Small().double()
    twin = copy.deepcopy(model)
    probe, plain = Probe(twin, engine=engine), Probe(model, engine=engine)
    for x in step_batches(4, torch.float64):
        torch.manual_seed(3)
        plain.backward(step_losses(model(x), x))
        torch.manual_seed(3)
        out = twin(x)
        apart = _halves(out, x)
        expected = [
            [torch.cat([g.flatten() for g in torch.autograd.grad(d, list(m.parameters()), retain_graph=True)])]
            for m in (twin.first, twin.norm, twin.second)
            for d in apart.values()
        ]
        probe.backward(step_losses(out, x), null=apart)
        rows = torch.stack([v for (v,) in expected[6:9]])  # of `second`
        null = probe.log.null
        assert null is not None
        upper = torch.triu_indices(3, 3)
        torch.testing.assert_close(null.grams[-1, 2], (rows @ rows.T)[upper[0], upper[1]], rtol=1e-9, atol=1e-15)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert torch.equal(p.grad, q.grad), name
    assert torch.equal(probe.log.grams, plain.log.grams)
    assert probe.log.null is not None and probe.log.null.steps == probe.log.steps == 4 and plain.log.null is None


def test_a_null_goes_on_where_it_was_stopped_and_what_does_not_go_with_it_is_refused() -> None:
    torch.manual_seed(0)
    model, (x,) = Small(), step_batches(1, torch.float32)
    whole, parts = Probe(model), Probe(model)
    for _ in range(3):
        out = model(x)
        whole.backward(step_losses(out, x), null=_halves(out, x))
        out = model(x)
        parts.backward(step_losses(out, x), null=_halves(out, x))
        state, parts = parts.state_dict(), Probe(model)
        parts.load_state_dict(state)
    assert whole.log.null is not None and parts.log.null is not None
    assert parts.log.null.steps == whole.log.null.steps == 3
    out = model(x)
    losses, apart = step_losses(out, x), _halves(out, x)
    with pytest.raises(ProbeError, match="micro-batches"):
        parts.backward(losses, null=apart, last=False)
    with pytest.raises(ProbeError, match="scaled"):
        parts.backward(losses, null=apart, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ProbeError, match="tasks without a loss"):
        parts.backward({"a": losses["a"], "b": losses["b"]}, null=apart)
    some = {"a": apart["a"], "c": apart["c"]}
    parts.backward(losses, null=some)
    assert parts.log.null is not None and parts.log.null.tasks == parts.log.tasks
    assert parts.log.null.cosines()[-1].isnan().sum(1).tolist() == [2] * 3
