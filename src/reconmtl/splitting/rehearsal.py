"""A rehearsal of a call: a copy of a split model, its copies moved apart, against one ordinary network per task."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import TaskCopies
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.outputs import get_task, is_keyed, select
from reconmtl.splitting.ownership import kept, own_inputs, plain_copy
from reconmtl.splitting.storage import GroupTensors, Record, clone, own_tensors, record
from reconmtl.splitting.structure import Value, tensors
from reconmtl.splitting.tolerances import close, same_outputs


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal has shown.

    Attributes:
        model: The copy that was called; it knows what a first call finds out.
        output: Largest difference of an output, relative to the largest value of that output.
        gradient: Largest difference of a gradient, relative to the task's largest gradient.
        random: The forward draws random numbers even without dropout, so that nothing was compared.
    """

    model: nn.Module
    output: float = 0.0
    gradient: float = 0.0
    random: bool = False


def apart(model: nn.Module, *, training: bool | None = None) -> nn.Module:
    """A copy of a split model, without dropout, in which no task's value can pass for another's unnoticed.

    Its copies are moved apart a little; so are parameters that are all zero, which hide what is behind them. It shares
    the other parameters; buffers and attributes are its own.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        memo = kept(model)
        mine = {id(p) for m in model.modules() if isinstance(m, GroupTensors) for p in m.parameters()}
        for p in model.parameters():
            if id(p) in mine or not (p.is_meta or bool(p.detach().any())):
                memo[id(p)] = _moved(p, generator)
        twin = copy.deepcopy(model, memo)
    if training is not None:
        twin.train(training)
    for m in twin.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.training = False
        if isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
            m.__dict__["dropout"] = 0.0
    return twin


def _moved(p: Tensor, generator: torch.Generator) -> Tensor:
    new = clone(p)
    if p.is_floating_point() or p.is_complex():
        noise = torch.rand(p.shape, generator=generator).to(p.device, p.real.dtype if p.is_complex() else p.dtype)
        new.data = new.data * (1 + 0.05 * noise) + 0.01 * noise
    return new


def rehearse(
    model: nn.Module,
    rec: Record,
    args: Sequence[Value],
    kwargs: dict[str, Value],
    *,
    tasks: Sequence[str],
    where: str,
    training: bool | None = None,
    gradients: bool = False,
) -> Rehearsal:
    """Call a copy of a split model, and one ordinary network for each of some tasks; compare.

    Args:
        model: The split model, which has learned who owns what; nothing in it changes, nor does any random state.
        rec: Its record.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        tasks: The tasks to compare.
        where: How messages begin.
        training: The mode to set; None leaves every module's own.
        gradients: Compare gradients too.

    Returns:
        The largest differences found, all within tolerance.

    Raises:
        SplitError: If anything differs; the message names the task and the output, parameter or buffer.
    """
    assert rec.root is not None
    with untouched_randomness():
        base = apart(model, training=training)
        trial = copy.deepcopy(base, kept(base))
        root = record(trial).root  # type: ignore[union-attr]
        assert root is not None
        root.rehearsed |= {True, False}
        alone = {id(p) for m in trial.modules() if isinstance(m, torch.jit.ScriptModule) for p in m.parameters()}
        params = {n: p for n, p in trial.named_parameters() if p.requires_grad and id(p) not in alone}
        before = _random_state()
        out = _run(trial, args, kwargs)
        if before != _random_state():
            return Rehearsal(trial, random=True)
        if any(t.is_meta for t in tensors(out)):
            return Rehearsal(trial)
        output = gradient = 0.0
        for task in tasks:
            mask = rec.family.mask([task])
            twin = plain_copy(base, mask, share_buffers=False)
            calls = _count_calls(twin)
            expected = select(_run(twin, args, kwargs), task, rec.family.tasks)
            mine = get_task(out, task) if is_keyed(out, rec.family.tasks) else out
            at = f"{where}, task {task!r}"
            output = max(output, same_outputs(mine, expected, at))
            if gradients:
                gradient = max(gradient, _same_gradients(mine, expected, params, at))
            if rec.root.norm_stats == "per-task":
                foreign = _foreign(model, mask)
                once = {
                    k: b
                    for k, b in _buffers(twin, 0).items()
                    if calls.get(k.rpartition(".")[0], 0) < 2 and not k.startswith(foreign)
                }
                _same_buffers(_buffers(trial, mask), once, at)
        return Rehearsal(trial, output, gradient)


def _run(model: nn.Module, args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    args, kwargs = own_inputs(args, kwargs)
    return model(*args, **kwargs)


def _random_state() -> list[Value]:
    numpy: Value = np.random.get_state(legacy=False)  # noqa: NPY002 the user's global state
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), str(numpy), *(t.tolist() for t in (torch.get_rng_state(), *devices))]


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
