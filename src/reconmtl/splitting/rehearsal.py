"""A rehearsal of a call: a copy of a split model, its copies moved apart, against one ordinary network per task."""

import random as python_random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reconmtl.errors import ReconError, SplitError
from reconmtl.layers import ROOT, TaskCopies
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.branched import WAYS_OUT, Branched
from reconmtl.splitting.outputs import get_task, is_keyed, select
from reconmtl.splitting.ownership import copied, kept, own_inputs, plain_copy, unwritten
from reconmtl.splitting.refusals import located
from reconmtl.splitting.storage import GroupTensors, Record, clone, own_tensors, record
from reconmtl.splitting.structure import Value, tensors
from reconmtl.splitting.tolerances import Shown, differences, precision, refusal, unexplained


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal has shown.

    Attributes:
        model: The copy that was called; it knows what a first call finds out.
        output: Largest difference of an output, relative to the largest value of that output.
        gradient: Largest difference of a gradient, relative to the task's largest gradient.
        random: The forward draws random numbers even without dropout, or is so sensitive to rounding that an ordinary
            network differs as much from itself: nothing can be told.
        empty: The outputs have no values (the meta device, an empty batch), so that nothing was compared.
    """

    model: nn.Module
    output: float = 0.0
    gradient: float = 0.0
    random: bool = False
    empty: bool = False


def apart(model: nn.Module, *, training: bool | None = None, moved: bool = True, dropout: bool = False) -> nn.Module:
    """A copy of a split model in which no task's value can pass for another's unnoticed.

    Its copies are moved apart a little; so are parameters that are all zero, which hide what is behind them. It shares
    the other parameters' memory, not their hooks; buffers and attributes are its own.

    Args:
        model: The split model.
        training: The mode to set; None leaves every module's own.
        moved: Move at all; copies stay as they are otherwise.
        dropout: Whether it has dropout.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        memo = kept(model)
        mine = {id(p) for m in model.modules() if isinstance(m, GroupTensors) for p in m.parameters()}
        for p in model.parameters():
            if moved and (id(p) in mine or not (p.is_meta or bool(p.detach().any()))):
                memo[id(p)] = _moved(p, generator)
            elif type(p) is nn.Parameter:
                memo[id(p)] = alias = nn.Parameter(p.detach(), p.requires_grad)
                alias.__dict__.update(vars(p))
        twin = copied(model, memo)
    if training is not None:
        twin.train(training)
    for m in () if dropout else twin.modules():
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


class _Quiet(TorchFunctionMode):
    """Turns off dropout that a forward calls as a function."""

    def __torch_function__(
        self, func: Callable[..., Value], _: object, args: Sequence[Value] = (), kwargs: dict[str, Value] | None = None
    ) -> Value:
        """As the function, with a probability of 0."""
        kwargs = dict(kwargs or {})
        place = _PROBABILITIES.get(func)
        if place is not None:
            position, name = place
            args = (*args[:position], 0.0, *args[position + 1 :]) if len(args) > position else args
            if name in kwargs or (len(args) <= position and not name.startswith("dropout")):
                kwargs[name] = 0.0
        return func(*args, **kwargs)


_PROBABILITIES: dict[Callable[..., Value], tuple[int, str]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), (1, "p")),
    **dict.fromkeys((F.feature_alpha_dropout, torch.dropout, torch.dropout_, torch.feature_dropout), (1, "p")),
    F.scaled_dot_product_attention: (4, "dropout_p"),
    F.multi_head_attention_forward: (10, "dropout_p"),
}
"""Where functions take the probability of dropout: position and name."""


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
    """Call one ordinary network for each of some tasks, and a copy of a split model; compare.

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
        The largest differences found, all of them rounding.

    Raises:
        SplitError: If anything differs; the message names the task and the output, parameter or buffer.
    """
    assert rec.root is not None
    with untouched_randomness(), unwritten(model):
        play = _Play(model, rec, args, kwargs, tasks, gradients)
        try:
            base, alone = play.alone(training, moved=True)
        except ReconError:
            raise
        except Exception:  # the forward does not stand moved copies (a matrix that is no covariance any more)
            base, alone = play.alone(training, moved=False)
        with play.around:
            out = play.split(base)
            shown = list(tensors(out))
            if play.random or any(t.is_meta for t in shown) or not any(t.numel() for t in shown):
                return Rehearsal(base, random=play.random, empty=not play.random)
            output = gradient = 0.0
            random = False
            keyed = is_keyed(out, rec.family.tasks)
            buffers = {task: _buffers(base, rec.family.mask([task])) for task in alone}
            for task, expected in alone.items():
                mine = play.show(get_task(out, task) if keyed else out, buffers[task], expected)
                found = differences(mine, expected, f"{where}, task {task!r}")
                far = [d for d in found if not d.within_rounding]
                if far:  # a second opinion: how far does an ordinary network move if it is rounded otherwise?
                    again, nudged = (differences(play.again(task, nudge=n), expected, where) for n in (False, True))
                    random = random or not all(d.within_kernels for d in far)
                    far = unexplained(far, again, nudged)
                    if far:
                        raise refusal(far[0], again)
                output = max([output, *(d.size for d in found if d.kind == "output")])
                gradient = max([gradient, *(d.size for d in found if d.kind == "gradient")])
        return Rehearsal(base, random=True) if random else Rehearsal(base, output, gradient)


class _Play:
    """One call, to be made of several networks."""

    def __init__(
        self,
        model: nn.Module,
        rec: Record,
        args: Sequence[Value],
        kwargs: dict[str, Value],
        tasks: Sequence[str],
        gradients: bool,
    ) -> None:
        self.model, self.rec, self.args, self.kwargs, self.tasks = model, rec, args, kwargs, tasks
        self.gradients = gradients
        self.random = False
        self.around: Any = nullcontext()
        self.params: dict[str, nn.Parameter] = {}
        self.made: tuple[bool | None, bool] = (None, True)

    def alone(self, training: bool | None, *, moved: bool) -> tuple[nn.Module, dict[str, Shown]]:
        """A copy to call, and what ordinary networks of it show, one after the other, so that none needs room later."""
        base = apart(self.model, training=training, moved=moved)
        root = record(base).root  # type: ignore[union-attr]
        assert root is not None
        root.rehearse = False
        scripted = {id(p) for m in base.modules() if isinstance(m, torch.jit.ScriptModule) for p in m.parameters()}
        self.params = {n: p for n, p in base.named_parameters() if p.requires_grad and id(p) not in scripted}
        self.random, self.around = False, nullcontext()
        self.made = (training, moved)
        shown = self._shows(base)
        if shown is None and any(m.training for m in base.modules()):
            self.around = _Quiet()
            try:
                shown = self._shows(base)
            except Exception:  # what is compiled does not stand the mode that turns dropout off
                shown = None
            self.around = self.around if shown else nullcontext()
        self.random = shown is None
        return base, shown or {}

    def _shows(self, base: nn.Module) -> dict[str, Shown] | None:
        """What ordinary networks show; None if they draw random numbers."""
        shown = {}
        with self.around:
            for task in self.tasks:
                before = random_state()
                shown[task] = self._one(base, task)
                if before != random_state():
                    return None
        return shown

    def split(self, base: nn.Module) -> Value:
        """What the split model returns, where ordinary networks have returned something."""
        try:
            return _run(base, self.args, self.kwargs)
        except (ReconError, Warning, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = located(base, error)
            raise SplitError(
                f"The forward fails once the model is split ({type(error).__name__}: {text}). A split layer's tensors "
                "are read from the layer itself (layer.weight), not through its state_dict(), parameters() or "
                f"_parameters. {WAYS_OUT}"
            ) from error

    def _one(self, base: nn.Module, task: str) -> Shown:
        mask = self.rec.family.mask([task])
        twin = plain_copy(base, mask, share_buffers=False)
        calls = _count_calls(twin)
        out = select(_run(twin, self.args, self.kwargs), task, self.rec.family.tasks)
        once: dict[str, Tensor] = {}
        if self.rec.root is not None and self.rec.root.norm_stats == "per-task":
            foreign = _foreign(self.model, mask)
            once = {
                k: b
                for k, b in _buffers(twin, 0).items()
                if calls.get(k.rpartition(".")[0], 0) < 2 and not k.startswith(foreign)
            }
        return self.show(out, once, None)

    def show(self, out: Value, buffers: dict[str, Tensor], like: Shown | None) -> Shown:
        """What a call has shown, without its graph."""
        outputs = list(tensors(out))
        grads = None
        if self.gradients and (like is None or like.gradients is not None):
            try:
                grads = projected_gradients(outputs, self.params, retain=like is not None)
            except Exception:  # has no backward in this mode, as recurrent nets of cuDNN in eval mode
                if like is not None:
                    raise
        return Shown([t.detach() for t in outputs], grads, buffers)

    def again(self, task: str, *, nudge: bool) -> Shown:
        """What an ordinary network shows once more; after the smallest change of its parameters if `nudge`."""
        base = apart(self.model, training=self.made[0], moved=self.made[1])
        if nudge:
            size, memo, generator = precision(base), kept(base), torch.Generator().manual_seed(1)
            for p in base.parameters():
                memo[id(p)] = new = clone(p)
                if p.is_floating_point():
                    sign = torch.randint(2, p.shape, generator=generator).to(p.device, p.dtype) * 2 - 1
                    new.data = p.detach() * (1 + size * sign)
            base = copied(base, memo)
        params, mine = self.params, dict(base.named_parameters())
        self.params = {n: mine[n] for n in params}
        try:
            return self._one(base, task)
        finally:
            self.params = params


def _run(model: nn.Module, args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    args, kwargs = own_inputs(args, kwargs)
    return model(*args, **kwargs)


def random_state() -> list[Value]:
    """Every global random state, as values that can be compared."""
    numpy: Value = np.random.get_state(legacy=False)  # noqa: NPY002 the user's global state
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [python_random.getstate(), str(numpy), *(t.tolist() for t in (torch.get_rng_state(), *devices))]


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
    """What buffers hold as one task sees them, by their names in the original model.

    Copies, as a backward pass through checkpoints calls modules once more.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (TaskCopies, GroupTensors)):
            continue
        rec = record(module)
        buffers = module._buffers if rec is None else own_tensors(module, rec, mask)[1]
        for k, b in buffers.items():
            if type(b) is Branched:
                raise SplitError(
                    f"{name or ROOT} writes values that differ between tasks into its `_buffers`. Assign them instead: "
                    f"self.{k} = ... (each task then has a buffer of its own)."
                )
        found.update({f"{name}.{k}": b.detach().clone() for k, b in buffers.items() if b is not None})
    return found


def projected_gradients(
    outputs: list[Tensor], params: dict[str, Any], *, retain: bool
) -> dict[str, Tensor | None] | None:
    """Gradients of a fixed random projection of the outputs; None if they have none."""
    generator = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for t in outputs:
        if t.requires_grad and t.numel():
            weight = torch.rand(t.shape, generator=generator, dtype=torch.float64) / t.numel() ** 0.5
            term = (t * weight.to(t)).sum()
            term = term.abs() if t.is_complex() else term
            total = term if total is None else total + term
    if total is None or not params:
        return None
    grads = torch.autograd.grad(total, list(params.values()), retain_graph=retain, allow_unused=True)
    return dict(zip(params, grads, strict=True))
