"""What cannot be split, found before anything changes: every refusal names the module and the way out."""

import torch
from torch import nn

from reconmtl.errors import SplitError
from reconmtl.layers import ROOT, TaskCopies
from reconmtl.plan import Partition, Plan
from reconmtl.splitting.storage import COPIES, RECORD, GroupTensors, plain_tensors

_WRAPPERS = {
    "DistributedDataParallel": "split first, then wrap: DistributedDataParallel(rm.split(model, plan))",
    "DataParallel": "split `model.module` first, then wrap the result",
    "FullyShardedDataParallel": "split first, then shard",
    "OptimizedModule": "split first, then compile: torch.compile(rm.split(model, plan))",
}


def check_model(model: object, plan: object) -> None:
    """Refuse models that no plan can split.

    Raises:
        SplitError: If the model is no module, wrapped, scripted, lazy or split already, or the plan is none.
    """
    if not isinstance(model, nn.Module):
        raise SplitError(f"model: expected an nn.Module, got {type(model).__name__}.")
    if not isinstance(plan, Plan):
        raise SplitError(f"plan: expected a Plan, got {type(plan).__name__}. Write `Plan(tasks=[...], layers=[...])`.")
    for kind in type(model).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            raise SplitError(f"The model is wrapped in {kind.__name__}: {_WRAPPERS[kind.__name__]}.")
    for name, module in model.named_modules():
        shown = name or ROOT
        if is_sharded(module):
            raise SplitError(f"{shown} is sharded (FSDP): split first, then shard.")
        if type(module).__name__ == "OptimizedModule":
            raise SplitError(
                f"{shown} is wrapped by torch.compile: split first, then compile what comes before the first split "
                "layer, or torch.compile(rm.view(model, task))."
            )
        if RECORD in module.__dict__:
            raise SplitError(
                f"{shown} is part of a split model already. Split the original model with the refined plan: "
                "plan.refine(other)."
            )
        if isinstance(module, torch.jit.ScriptModule) and not name:
            raise SplitError(
                "The model is compiled by torch.jit; its forward is no Python. Split before torch.jit.script."
            )
        lazy = [n for n, p in module.named_parameters(recurse=False) if nn.parameter.is_lazy(p)]
        lazy += [n for n, b in module.named_buffers(recurse=False) if nn.parameter.is_lazy(b)]
        if lazy:
            raise SplitError(f"{shown} is lazy: {lazy} have no shape yet. Call the model once, then split it.")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and "_initialize_hook" in vars(module):
            raise SplitError(
                f"{shown} is lazy: it has its shapes, but would become {module.cls_to_become} only when it is called. "
                "Call the model once, then split it."
            )


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is under FSDP2, `fully_shard`."""
    return type(module).__name__.startswith("FSDP") and hasattr(module, "unshard")


def check_layers(model: nn.Module, layers: dict[str, Partition]) -> None:
    """Refuse layers whose tensors are also held somewhere else.

    Raises:
        SplitError: If a layer is scripted, tied to one not split alike, or its tensors are held in an attribute.
    """
    modules = dict(model.named_modules())
    planned = {name: modules[name if name != ROOT else ""] for name in layers}
    faults = []
    for name, module in planned.items():
        if isinstance(module, torch.jit.ScriptModule):
            faults.append(f"{name} is compiled by torch.jit; split before torch.jit.script")
        if hasattr(module, COPIES):
            faults.append(f"{name} has an attribute {COPIES!r}, the name under which copies are kept; rename it")
    faults += _tied(modules, planned, layers) + _held(model, planned)
    if faults:
        raise SplitError("Cannot split: " + "; ".join(faults) + ".")


def _tied(modules: dict[str, nn.Module], planned: dict[str, nn.Module], layers: dict[str, Partition]) -> list[str]:
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((name or ROOT, key))
    out = []
    for held in owners.values():
        names = list(dict.fromkeys(n for n, _ in held))
        split = [n for n in names if n in planned]
        if not split or len(names) == 1:
            continue
        rest = [n for n in names if n not in planned]
        shown = " and ".join(f"{n}.{key}" for n, key in held)
        if rest:
            out.append(
                f"{shown} are one parameter (tied); splitting {split} alone would untie it. Name all of {names} in the "
                "plan (then it is tied within each task), or none"
            )
        elif len({layers[n] for n in split}) > 1:
            out.append(
                f"{shown} are one parameter (tied), but the plan groups their tasks differently; use the same groups"
            )
    return out


def _held(model: nn.Module, planned: dict[str, nn.Module]) -> list[str]:
    own = {id(p): f"{name}.{key}" for name, m in planned.items() for key, p in m._parameters.items() if p is not None}
    names = {id(m): n or ROOT for n, m in model.named_modules()}
    out = []
    for module, attribute, tensor in plain_tensors(model):
        if id(tensor) in own and not (isinstance(module, nn.RNNBase) and attribute.startswith("_flat_weight")):
            out.append(
                f"{own[id(tensor)]} is also held in the attribute {names[id(module)]}.{attribute}, which would keep "
                "pointing at one task's copy; read the parameter from its module in forward instead"
            )
    return out


def written_state(tensor: torch.Tensor) -> tuple[int, int]:
    """How often a tensor was written to and where its values are, which change when it is written or replaced."""
    try:
        return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()
    except RuntimeError:  # stands for a tensor without having values (torch.export)
        return 0, 0


def written_tensor(name: str) -> str:
    """The message about a forward that writes to a parameter or plain tensor which all tasks share."""
    return (
        f"{name}: the forward writes to this tensor, which all tasks share (an average of other weights, values set "
        "from the first batch). It may run several times, for one task after the other, and each run would change it. "
        "Register it as a buffer (each task then has its own where its values differ), write to it outside of the "
        "forward, or let the original model do so in a call before it is split."
    )


def located(module: nn.Module, error: BaseException) -> str:
    """The message of an error, with the name of the innermost module of the model in whose forward it came up."""
    names = {id(m): n for n, m in module.named_modules() if n and not isinstance(m, (TaskCopies, GroupTensors))}
    trace, inner = error.__traceback__, ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if id(owner) in names and isinstance(owner, nn.Module):
            inner = f"{names[id(owner)]} ({type(owner).__name__}): "
        trace = trace.tb_next
    text = str(error)
    return text if not inner or text.startswith(inner) else inner + text
