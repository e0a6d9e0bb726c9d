"""What a plan costs, without building the split model."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from reconmtl.errors import SplitError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting.refusals import check_model
from reconmtl.splitting.splitter import resolve, split
from reconmtl.splitting.storage import plain_tensors, record
from reconmtl.splitting.structure import Value, transform
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


def cost(model: nn.Module, plan: Plan | None = None, *, sample: object = None) -> Cost:
    """Size of a model, or of what `split(model, plan)` would return, without building it.

    With a sample, one forward in the model's mode is counted too. It runs on the meta device: no memory is taken and
    nothing is computed, so that a forward which needs values (`.item()`, boolean masks) cannot be counted.

    Args:
        model: Any module; a split one without a plan.
        plan: The plan to price.
        sample: A tensor [B, ...], a tuple of positional or a dict of keyword arguments.

    Returns:
        Parameters and megabytes; with a sample operations and kept activations.

    Raises:
        LayerMatchError: If a name of the plan matches no layer.
        SplitError: If the model is split already and a plan is given, or its forward cannot run on the meta device.

    Example:
        >>> cost(nn.Linear(10, 10), Plan(tasks=["a", "b", "c"], layers=["(root)"])).parameters
        330
        >>> cost(nn.Linear(10, 10), sample=torch.ones(4, 10)).flops
        800
    """
    total = sum(p.numel() for p in model.parameters())
    if plan is not None:
        if record(model) is not None:
            raise SplitError("This model is split already; give the original model with the plan, or no plan.")
        check_model(model, plan)
        planned = resolve(model, plan)
        sizes = {layer.name: layer.numel for layer in find_layers(model)}
        total += sum(sizes.get(name, 0) * (len(groups) - 1) for name, groups in planned.items())
    flops, activations = (None, None) if sample is None else _work(model, plan, sample)
    return Cost(total, total * BYTES_PER_PARAMETER / MEGABYTE, flops, activations)


class _Counter(TorchDispatchMode):
    """Adds up operations by PyTorch's own formulas; FlopCounterMode would also hook into every module's call."""

    total = 0

    def __torch_dispatch__(
        self, func: Value, types: object, args: tuple[Value, ...] = (), kwargs: dict[str, Value] | None = None
    ) -> Value:
        """Run one operator and count it."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)  # a composite counts as what it consists of
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _work(model: nn.Module, plan: Plan | None, sample: object) -> tuple[int, int]:
    """Operations of a forward, and bytes that it keeps for its backward."""
    shadow = _on_meta(model)
    if plan is not None:
        shadow = split(shadow, plan)
    args, kwargs = transform(call_arguments(sample), _meta)
    own = {t.untyped_storage()._cdata for t in (*shadow.parameters(), *shadow.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), t)  # the tensor too, so that no other one gets its address
        return t

    try:
        with torch.enable_grad():
            shadow(*args, **kwargs)  # a split model learns from its first call
            own |= {t.untyped_storage()._cdata for t in shadow.buffers()}
            mode = _Counter()  # type: ignore[no-untyped-call]
            with mode as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = shadow(*args, **kwargs)
    except SplitError:
        raise
    except RuntimeError as error:
        raise SplitError(
            f"cost: the forward cannot be counted on the meta device ({str(error)[:200]}); leave out `sample`."
        ) from error
    del out
    return counter.total, sum(size for size, _ in kept.values())


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
