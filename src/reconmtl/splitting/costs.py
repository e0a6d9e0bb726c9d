"""What a plan costs, without building the split model."""

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from reconmtl.errors import SplitError, nearest
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting.functions import written
from reconmtl.splitting.outputs import get_task, task_keys
from reconmtl.splitting.refusals import check_model
from reconmtl.splitting.splitter import resolve, split
from reconmtl.splitting.storage import plain_tensors, record
from reconmtl.splitting.structure import Value, tensors, transform
from reconmtl.splitting.verifying import call_arguments

BYTES_PER_PARAMETER = 4  # fp32, as the paper counts
MEGABYTE = 2**20


@dataclass(frozen=True)
class Cost:
    """Size of a model, and work of one call.

    Attributes:
        parameters: Elements of all parameters, tied ones once.
        megabytes: Of these parameters in fp32, in units of 2**20 bytes.
        flops: Floating-point operations of one forward with the sample, a multiply-add as two; None without a sample.
        activations: Bytes kept for the backward of that forward, parameters and buffers not counted; None without.
    """

    parameters: int
    megabytes: float
    flops: int | None = None
    activations: int | None = None


def cost(
    model: nn.Module, plan: Plan | None = None, *, sample: object = None, tasks: Iterable[str] | None = None
) -> Cost:
    """Size of a model, or of what `split(model, plan)` would return, without building it; of some tasks if asked.

    With a sample, one forward in the model's mode is counted too. It runs on the meta device: no memory is taken and
    nothing is computed, so that a forward which needs values (`.item()`, boolean masks) cannot be counted.

    Args:
        model: Any module; a split one without a plan.
        plan: The plan to price.
        sample: A tensor [B, ...], a tuple of positional or a dict of keyword arguments.
        tasks: Count only what the outputs of these tasks depend on, as if the rest were left out: what it takes to
            train or serve them alone. Needs a sample.

    Returns:
        Parameters and megabytes; with a sample operations and kept activations.

    Raises:
        LayerMatchError: If a name of the plan matches no layer.
        SplitError: If the model is split already and a plan is given, its forward cannot run on the meta device, or it
            has no such task.

    Example:
        >>> cost(nn.Linear(10, 10), Plan(tasks=["a", "b", "c"], layers=["(root)"])).parameters
        330
        >>> cost(nn.Linear(10, 10), sample=torch.ones(4, 10)).flops
        800
        >>> plan = Plan(tasks=["a", "b"], layers=["(root)"])
        >>> [cost(nn.Linear(10, 10), plan, sample=torch.ones(4, 10), tasks=t).flops for t in (["a"], ["a", "b"])]
        [800, 1600]
    """
    chosen = None if tasks is None else _chosen(model, plan, tasks, sample)
    total = sum(p.numel() for p in model.parameters())
    if plan is not None:
        if record(model) is not None:
            raise SplitError("This model is split already; give the original model with the plan, or no plan.")
        check_model(model, plan)
        planned = resolve(model, plan)
        sizes = {layer.name: layer.numel for layer in find_layers(model)}
        total += sum(sizes.get(name, 0) * (len(groups) - 1) for name, groups in planned.items())
    flops, activations = None, None
    if sample is not None:
        needed, flops, activations = _work(model, plan, sample, chosen)
        total = total if chosen is None else needed
    return Cost(total, total * BYTES_PER_PARAMETER / MEGABYTE, flops, activations)


def _chosen(model: nn.Module, plan: Plan | None, tasks: Iterable[str], sample: object) -> list[str]:
    chosen = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    rec = record(model)
    known = rec.family.tasks if rec is not None else plan.tasks if isinstance(plan, Plan) else chosen
    wrong = [t for t in chosen if t not in known]
    if not chosen or wrong:
        raise SplitError(f"tasks = {chosen}: " + (nearest(str(wrong[0]), known) if wrong else "name at least one."))
    if sample is None:
        raise SplitError(
            f"tasks = {chosen}: what these tasks need is found by a call; give `sample`, what the model is called with."
        )
    return chosen


# What a forward does ------------------------------------------------------------------------------------------------


@dataclass
class _Step:
    """One operator call: what it cost, the calls before it that it depends on, and what it read that none wrote."""

    flops: int
    after: set[int]
    leaves: set[int] = field(default_factory=set)


class _Steps(TorchDispatchMode):
    """Records operators by PyTorch's own formulas (FlopCounterMode would also hook into every module's call).

    What depends on what is told by memory: a call depends on the last call that wrote to the memory it reads.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.writer: dict[int, int] = {}
        self.alive: list[torch.UntypedStorage] = []  # or other tensors would get their addresses

    def __torch_dispatch__(
        self, func: Value, types: object, args: tuple[Value, ...] = (), kwargs: dict[str, Value] | None = None
    ) -> Value:
        """Run one operator and record it."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)  # a composite counts as what it consists of
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out, 0 if formula is None else formula(*args, **kwargs, out_val=out))
        return out

    def _record(self, func: Value, args: Sequence[Value], kwargs: dict[str, Value], out: Value, flops: int) -> None:
        read = {_memory(t) for t in tensors((tuple(args), kwargs))}
        changed = {_memory(t) for t in tensors(out)} - read
        for i, name in written(func):
            changed |= {_memory(t) for t in tensors(args[i] if 0 <= i < len(args) else kwargs.get(name))}
        if not changed:  # a view
            return
        self.alive += [t.untyped_storage() for t in tensors(out)]  # no tensors: these hold graph
        known = {m for m in read if m in self.writer}
        self.steps.append(_Step(flops, {self.writer[m] for m in known}, read - known))
        self.writer.update(dict.fromkeys(changed, len(self.steps) - 1))

    def needed(self, out: Value) -> tuple[int, set[int]]:
        """Operations, and memory that no operator wrote (of parameters, inputs), that an output depends on."""
        memory = {_memory(t) for t in tensors(out)}
        leaves = {m for m in memory if m not in self.writer}
        waiting = [self.writer[m] for m in memory if m in self.writer]
        seen = set(waiting)
        flops = 0
        while waiting:
            step = self.steps[waiting.pop()]
            flops += step.flops
            leaves |= step.leaves
            waiting += step.after - seen
            seen |= step.after
        return flops, leaves


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Kept:
    """A tensor that autograd keeps; dies with the graph that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _work(model: nn.Module, plan: Plan | None, sample: object, tasks: list[str] | None) -> tuple[int, int, int]:
    """Elements of the parameters and operations that a forward needs, and bytes that it keeps for its backward."""
    shadow = _on_meta(model)
    if plan is not None:
        shadow = split(shadow, plan)
        for p in shadow.parameters():
            p.data = torch.empty_like(p)  # copies of what has no memory share what little there is
    args, kwargs = transform(call_arguments(sample), _meta)
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(t: Tensor) -> _Kept:
        held = _Kept(t.detach())  # the tensor itself would keep its own graph
        kept.add(held)
        return held

    try:
        with torch.enable_grad():
            shadow(*args, **kwargs)  # a split model learns from its first call
            rec = record(shadow)
            if rec is not None and rec.root is not None:
                rec.root.rehearse = False
            mode = _Steps()
            with mode as steps, torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
                out = shadow(*args, **kwargs)
    except SplitError:
        raise
    except RuntimeError as error:
        raise SplitError(
            f"cost: the forward cannot be counted on the meta device ({str(error)[:200]}); leave out `sample`."
        ) from error
    if tasks is not None:
        out = _parts(out, tasks)  # the graph of all other outputs is gone, and what it kept
    own = {_memory(t) for t in (*shadow.parameters(), *shadow.buffers())}
    activations = {_memory(k.tensor): k.tensor.untyped_storage().nbytes() for k in kept}
    flops, leaves = steps.needed(out)
    if tasks is None:
        flops = sum(step.flops for step in steps.steps)
    elements = sum(p.numel() for p in shadow.parameters() if _memory(p) in leaves)
    return elements, flops, sum(size for memory, size in activations.items() if memory not in own)


def _parts(out: Value, tasks: list[str]) -> list[Value]:
    """The outputs of some tasks; the whole output of a model without heads."""
    names = task_keys(out)
    lacking = [t for t in tasks if t not in names]
    if not lacking:
        return [get_task(out, t) for t in tasks]
    if names:
        raise SplitError(f"The forward returned no output for {lacking}. {nearest(lacking[0], map(str, names))}")
    return [out]


def _meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model without its data."""
    memo: dict[int, Value] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in (*model.buffers(), *(t for _, _, t in plain_tensors(model))):
        memo.setdefault(id(b), _meta(b))
    return copy.deepcopy(model, memo)
