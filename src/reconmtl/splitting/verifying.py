"""Compare a split model, call by call and gradient by gradient, with one ordinary network per task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import TaskCopies
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.groups import MissingTaskError
from reconmtl.splitting.outputs import get_task, is_keyed, select
from reconmtl.splitting.ownership import Snapshot, own_inputs, plain_copy
from reconmtl.splitting.storage import GroupTensors, Record, own_tensors, record
from reconmtl.splitting.structure import Value, tensors
from reconmtl.splitting.tolerances import close, same_outputs


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        modes: The modes in which outputs and gradients were compared, of "train" and "eval".
        random: The modes in which the forward draws random numbers even without dropout, so that nothing was compared.
        output: Largest difference of an output, relative to the largest value of that output.
        gradient: Largest difference of a parameter's gradient, relative to the task's largest gradient.
    """

    modes: tuple[str, ...]
    random: tuple[str, ...]
    output: float
    gradient: float


def call_arguments(sample: object) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """How a model is called with a sample: a tuple as positional, a dict as keyword arguments, else as the only one."""
    if isinstance(sample, dict):
        return (), dict(sample)
    return (tuple(sample), {}) if isinstance(sample, tuple) else ((sample,), {})


def verify(split_model: nn.Module, sample: object) -> Verified:
    """Check on one sample that every task's output and gradient are those of an ordinary network of its own.

    Runs in train mode (with dropout off) and in eval mode, with copies moved apart a little, and puts parameters,
    gradients, buffers, modes and random state back. What the model learns from its first call, it learns here.

    Args:
        split_model: What `split` returned.
        sample: A tensor [B, ...], a tuple of positional or a dict of keyword arguments.

    Returns:
        The largest differences found, all within tolerance.

    Raises:
        SplitError: If anything differs; the message names the task and the output, parameter or buffer.
    """
    rec = record(split_model)
    if rec is None or rec.root is None:
        raise SplitError("verify: expected a model that `split` returned.")
    try:
        return _verify(split_model, rec, sample)
    except MissingTaskError:  # found in one mode what does not hold in the other; nothing is pruned from now on
        return _verify(split_model, rec, sample)


def _verify(model: nn.Module, rec: Record, sample: object) -> Verified:
    done, random = [], []
    worst = [0.0, 0.0]
    for mode in ("train", "eval"):
        with untouched_randomness(), _mode(model, training=mode == "train"), _told_apart(model), torch.enable_grad():
            outcome = _compare(model, rec, sample, mode)
        if outcome is None:
            random.append(mode)
            continue
        done.append(mode)
        worst = [max(a, b) for a, b in zip(worst, outcome, strict=True)]
    return Verified(tuple(done), tuple(random), *worst)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set a mode, with dropout off, and put every module's own back."""
    before = [(m, m.training, m.__dict__.get("dropout")) for m in model.modules()]
    if not training or not model.training:
        model.train(training)
    try:
        for m in model.modules():
            if isinstance(m, nn.modules.dropout._DropoutNd):
                m.training = False
            if isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
                m.__dict__["dropout"] = 0.0
        yield
    finally:
        for m, flag, dropout in before:
            m.training = flag
            if isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
                m.__dict__["dropout"] = dropout


@contextmanager
def _told_apart(model: nn.Module) -> Iterator[None]:
    """Move the copies apart, so that one task's value in another task's place shows, and put them back."""
    generator = torch.Generator().manual_seed(0)
    before = []
    try:
        for p in {id(p): p for m in model.modules() if isinstance(m, GroupTensors) for p in m.parameters()}.values():
            if p.is_floating_point() or p.is_complex():
                noise = torch.rand(p.shape, generator=generator).to(
                    p.device, p.real.dtype if p.is_complex() else p.dtype
                )
                before.append((p, p.data))
                p.data = p.data * (1 + 0.05 * noise) + 0.01 * noise
        yield
    finally:
        for p, data in before:
            p.data = data


def _compare(model: nn.Module, rec: Record, sample: object, mode: str) -> tuple[float, float] | None:
    args, kwargs = call_arguments(sample)
    tasks = rec.family.tasks
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    _call(model, args, kwargs, Snapshot(model, private=True))  # learns what the first call learns
    snapshot = Snapshot(model, private=True)
    try:
        state = torch.get_rng_state()
        out = _run(model, args, kwargs)
        random = not torch.equal(state, torch.get_rng_state())
        after = {t: _buffers(model, 1 << i) for i, t in enumerate(tasks)}
    finally:
        snapshot.restore()
    if random:
        return None
    assert rec.root is not None
    worst = [0.0, 0.0]
    for i, task in enumerate(tasks):
        twin = plain_copy(model, 1 << i, share_buffers=False)
        calls = _count_calls(twin)
        expected = select(_run(twin, args, kwargs), task, tasks)
        mine = get_task(out, task) if is_keyed(out, tasks) else out
        worst[0] = max(worst[0], same_outputs(mine, expected, f"{mode} mode, task {task!r}"))
        worst[1] = max(worst[1], _same_gradients(mine, expected, params, f"{mode} mode, task {task!r}"))
        if rec.root.norm_stats == "per-task":
            foreign = _foreign(model, 1 << i)
            once = {
                k: b
                for k, b in _buffers(twin, 0).items()
                if calls.get(k.rpartition(".")[0], 0) < 2 and not k.startswith(foreign)
            }
            _same_buffers(after[task], once, f"{mode} mode, task {task!r}")
    return worst[0], worst[1]


def _foreign(model: nn.Module, mask: int) -> tuple[str, ...]:
    """Prefixes of modules that only other tasks need; a task's own network runs them all the same."""
    owners = ((n, record(m)) for n, m in model.named_modules())
    return tuple(f"{n}." for n, r in owners if r is not None and not r.owner & mask)


def _count_calls(twin: nn.Module) -> dict[str, int]:
    """Count the calls of every module from now on: one called on several tasks' values updates buffers for all."""
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, module in twin.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # has no hooks
            continue
        module.register_forward_pre_hook(lambda *_, name=name: count(name))  # the twin is thrown away
    return calls


def _call(model: nn.Module, args: Sequence[Value], kwargs: dict[str, Value], snapshot: Snapshot) -> None:
    try:
        with torch.no_grad():
            _run(model, args, kwargs)
    finally:
        snapshot.restore()


def _run(model: nn.Module, args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    args, kwargs = own_inputs(args, kwargs)
    return model(*args, **kwargs)


def _buffers(model: nn.Module, mask: int) -> dict[str, Tensor]:
    """Buffers as one task sees them, by their names in the original model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (TaskCopies, GroupTensors)):
            continue
        rec = record(module)
        buffers = module._buffers if rec is None else own_tensors(module, rec, mask)[1]
        found.update({f"{name}.{k}": b for k, b in buffers.items() if b is not None})
    return found


def _same_gradients(mine: Value, expected: Value, params: dict[str, Any], where: str) -> float:
    a, b = _gradients(mine, params), _gradients(expected, params)
    if b is None:
        return 0.0
    if a is None:
        raise SplitError(f"{where}: the output has no gradient, that of a network of its own has one.")
    top = max((float(g.abs().max()) for g in b.values() if g is not None and g.numel()), default=0.0)
    worst = 0.0
    for name in params:
        x, y = a[name], b[name]
        if x is None and y is None:
            continue
        at = f"{where}: gradient of {name}"
        if y is None:
            assert x is not None
            if bool(x.count_nonzero()):
                raise SplitError(f"{at} is not zero, although the task's own network does not use it.")
        elif x is None:
            raise SplitError(f"{at} is missing, although the task's own network uses it.")
        else:
            worst = max(worst, close(x, y, at, "see `mode='loop'` for a way that always works.", max(top, 1e-30)))
    return worst


def _gradients(out: Value, params: dict[str, Any]) -> dict[str, Tensor | None] | None:
    """Gradients of a fixed random projection of the output."""
    generator = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for t in tensors(out):
        if t.requires_grad and t.numel():
            weight = torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t)
            term = (t * weight).sum().abs() if t.is_complex() else (t * weight).sum()
            total = term if total is None else total + term
    if total is None or not params:
        return None
    grads = torch.autograd.grad(total, list(params.values()), retain_graph=True, allow_unused=True)
    return dict(zip(params, grads, strict=True))


def _same_buffers(mine: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for name, y in expected.items():
        x = mine[name]
        if x.shape == y.shape:
            close(x, y, f"{where}: buffer {name} after the call", "name its module in `atomic=[...]`.")
