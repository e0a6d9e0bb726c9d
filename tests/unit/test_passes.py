import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from reconmtl.buffers import buffers_once
from reconmtl.errors import ProbeError
from reconmtl.gram import Gradients
from reconmtl.probing import Probe


def _chain(width: int = 16, depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh()))).double()


def _losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    z = model(x)
    return {t: (z * (i + 1)).sin().pow(2).sum() for i, t in enumerate("abc")}


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_stages_keep_to_the_bound_and_change_nothing(engine: str) -> None:
    model, x = _chain(), torch.randn(8, 16, dtype=torch.float64)
    layer = 3 * (16 * 16 + 16) * 8 if engine == "flat" else 3 * 16 * 8 * 8  # bytes: three tasks' gradients of a layer
    whole = Gradients(model, engine=engine)
    expected = whole.sweep(_losses(model, x))
    assert whole._buffer is not None
    assert whole._buffer.nbytes == 6 * layer
    for fit in (1, 2):
        gradients = Gradients(model, engine=engine, memory=fit * layer)
        found = gradients.sweep(_losses(model, x))
        assert set(gradients.engines.values()) == {"flat (as asked for)" if engine == "flat" else "delta"}
        assert gradients._buffer is not None
        assert gradients._buffer.nbytes == fit * layer
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_the_graph_is_freed_after_a_sweep_and_kept_when_asked(engine: str) -> None:
    model, x = _chain(), torch.randn(8, 16, dtype=torch.float64)
    gradients = Gradients(model, engine=engine)
    for _ in range(2):  # the first step of `delta` also compares it with `flat`
        losses = _losses(model, x)
        kept = gradients.sweep(losses, retain_graph=True)
        again = gradients.sweep(losses)
        assert torch.equal(kept.gram, again.gram)
        with pytest.raises(RuntimeError, match="second time"):
            losses["a"].backward()


def test_nothing_keeps_the_graph_alive() -> None:
    model, x = _chain(), torch.randn(8, 16, dtype=torch.float64)
    gradients = Gradients(model, engine="delta")
    z = model[0](x)
    alive = weakref.ref(z)
    losses = {"a": model[1:](z).sum(), "b": model[1:](z).sin().sum()}
    gradients.sweep(losses)
    del z, losses
    gc.collect()
    assert alive() is None


def test_only_the_first_pass_changes_running_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    settle = buffers_once(norm)
    assert norm.running_mean is not None
    norm(torch.randn(4, 3) + 5)
    settle()
    once = norm.running_mean.clone()
    norm(torch.randn(4, 3) - 9)
    settle()
    assert torch.equal(norm.running_mean, once)
    assert int(norm.num_batches_tracked or 0) == 1


def test_two_hundred_steps_leave_nothing_behind() -> None:
    """The user's exception, ours and success take turns; live tensors are counted, and what hangs on the model."""
    model, x = _chain(), torch.randn(8, 16, dtype=torch.float64)
    probe = Probe(model, engine="delta")
    counts = []
    for step in range(200):
        losses = _losses(model, x)
        if step % 5 == 3:
            with pytest.raises(ProbeError, match="expected a scalar"):
                probe.backward({**losses, "b": x})
        elif step % 5 == 4:
            losses["b"].backward()
            with pytest.raises(RuntimeError, match="second time"):
                probe.backward(losses)
        else:
            probe.backward(losses)
        model.zero_grad()
        del losses
        if step >= 20 and step % 40 == 0:
            gc.collect()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()) - len(probe._recorder._chunks))
    recorded = [40 * 3 // 5] * (len(counts) - 1)  # one small Gram per measured step waits for its chunk
    assert all(b - a <= r for a, b, r in zip(counts, counts[1:], recorded, strict=False)), counts
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    assert all(not p._backward_hooks and not vars(p) for p in model.parameters())
