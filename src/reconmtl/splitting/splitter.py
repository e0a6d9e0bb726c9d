"""`split`: give chosen layers one copy per task, in any model, without rewriting it."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from reconmtl.errors import LayerMatchError, SplitError, nearest
from reconmtl.layers import ROOT, find_layers, match_layers
from reconmtl.plan import Partition, Plan
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.adapted import adapt
from reconmtl.splitting.calls import FAST_PATHS
from reconmtl.splitting.groups import Family, refine
from reconmtl.splitting.initialisation import fresh
from reconmtl.splitting.ownership import copied
from reconmtl.splitting.refusals import check_layers, check_model
from reconmtl.splitting.storage import Root, plain_tensors, record, split_parameters
from reconmtl.splitting.structure import Value
from reconmtl.splitting.verifying import teach, verify

INITS = ("copy", "fresh")
NORM_STATS = ("per-task", "shared")
MODES = ("branch", "loop")


def split(
    model: nn.Module,
    plan: Plan,
    *,
    init: str = "copy",
    norm_stats: str = "per-task",
    sample: object = None,
    atomic: Iterable[str] = (),
    mode: str = "branch",
    rehearse: bool = True,
) -> nn.Module:
    """Give the planned layers one copy per task (or per group of tasks), without rewriting the model.

    What comes before the first split layer is computed once; from there on each task (each group of tasks that still
    agree) has its own values. Build the optimizer after splitting, or carry one over with `split_optimizer`.

    Args:
        model: Any module whose forward is Python. It stays as it is; the result is a copy.
        plan: Names (or globs) of layers, and the groups of tasks that keep sharing each.
        init: "copy": every copy starts as the layer is now. "fresh": each is drawn anew by its module's own reset.
        norm_stats: "per-task": running statistics per task wherever a normalisation's input is per task. "shared": one
            set, updated once per branch, as the published code does.
        sample: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments. With it,
            the split model is verified at once (see `verify`); without, the first call finds what it needs to know.
        atomic: Names (or globs) of modules to run whole, once per branch, on plain tensors: for custom autograd
            Functions, control flow on values, buffers of their own.
        mode: "branch", or "loop": one run of the whole network per task. Always works, and costs as many networks.
        rehearse: Compare with ordinary networks, here if there is a sample, else in the first call of each mode. False:
            compare nothing; for a forward whose side effects outside of the model must not be repeated, or that is
            known to be right.

    Returns:
        A model of the same class, called in the same way. Its forward returns {task: output}; for a model without
        heads, {task: what the model returns}.

    Raises:
        LayerMatchError: If a name matches no layer.
        SplitError: If the model cannot be split so without changing what it computes.

    Reference: Shi et al., Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning, ICLR 2023.

    Example:
        >>> import torch
        >>> trunk = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> sorted(split(trunk, Plan(tasks=["seg", "depth"], layers=["2"]))(torch.ones(1, 2)))
        ['depth', 'seg']
    """
    _choose("init", init, INITS)
    _choose("norm_stats", norm_stats, NORM_STATS)
    _choose("mode", mode, MODES)
    check_model(model, plan)
    resolved = resolve(model, plan)
    whole = _modules_named(model, [atomic] if isinstance(atomic, str) else atomic)
    check_layers(model, resolved)
    family = Family(plan.tasks)
    with untouched_randomness():
        new = _copy(model)
        _build(new, family, resolved, whole, norm_stats, Root(_plan_state(plan, resolved), norm_stats, mode, rehearse))
        if init == "fresh":
            fresh(new, model, list(resolved))
    if sample is not None:
        (verify if rehearse else teach)(new, sample)
    return new


def _choose(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SplitError(f"{name} = {value!r}: expected one of {list(known)}. {nearest(str(value), known)}")


def _plan_state(plan: Plan, layers: dict[str, Partition]) -> dict[str, object]:
    return Plan(tasks=plan.tasks, layers=layers, chosen=plan.chosen).to_dict()


def resolve(model: nn.Module, plan: Plan) -> dict[str, Partition]:
    """Resolve a plan's names, aliases and globs to this model's layers, in network order.

    Raises:
        LayerMatchError: If a name matches no layer; all such names are listed.
    """
    layers = find_layers(model)
    owners = {layer.name for layer in layers}
    owners |= {n or ROOT for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())}
    names = [n or ROOT for n, _ in model.named_modules() if (n or ROOT) in owners]  # with those of tied parameters only
    aliases = {a: layer.name for layer in layers for a in layer.aliases}
    match_layers([aliases.get(p, p) for p in plan.layers], names)  # reports every fault at once
    found: dict[str, Partition] = {}
    family = Family(plan.tasks)
    for pattern, groups in plan.layers.items():
        for name in match_layers([aliases.get(pattern, pattern)], names):
            if name in found and pattern == name:
                found[name] = groups  # an exact name wins over globs before it
            elif name in found and name not in plan.layers:
                masks = [tuple(family.mask(g) for g in p) for p in (found[name], groups)]
                found[name] = tuple(family.names(m) for m in refine(*masks))
            else:
                found.setdefault(name, groups)
    return {n: found[n] for n in names if n in found}


def _modules_named(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    names = [n or ROOT for n, _ in model.named_modules()]
    try:
        return match_layers(patterns, names)
    except LayerMatchError as error:
        first = str(error).splitlines()[0].replace("layer that owns parameters", "module")
        raise LayerMatchError(f"atomic: {first}") from None


def _copy(model: nn.Module) -> nn.Module:
    """Deepcopy, except that graph left over in attributes by an earlier forward is cut."""
    memo: dict[int, Value] = {}
    for _, _, t in plain_tensors(model):
        if not t.is_leaf:
            memo[id(t)] = t.detach().clone()
    new = copied(model, memo)
    for p in new.parameters():
        p.grad = None
    return new


def _build(
    model: nn.Module, family: Family, layers: dict[str, Partition], whole: list[str], norm_stats: str, root: Root
) -> None:
    modules = dict(model.named_modules())
    adapt(model, family, ROOT, root=root)
    per_task = norm_stats == "per-task"
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        leaf = is_leaf(module)
        stats = "never"
        if per_task and any(b is not None for b in module._buffers.values()):
            stats = "always" if has_running_statistics(module) else "watch"
        special = leaf and not _maps_op_by_op(module)
        named = (name or ROOT) in whole
        if special or named or isinstance(module, FAST_PATHS) or stats != "never":
            adapt(module, family, name or ROOT, atomic=special or named, stats=stats)
    for name in [ROOT] if root.mode == "loop" else whole:  # below what runs whole, state of any kind is each task's own
        start = name if name != ROOT else ""
        for path, module in modules[start].named_modules(prefix=start):
            has_buffers = per_task and any(b is not None for b in module._buffers.values())
            own = not type(module).__module__.startswith("torch.")
            if record(module) is None and (has_buffers or own) and not isinstance(module, torch.jit.ScriptModule):
                adapt(module, family, path or ROOT, stats="watch" if has_buffers else "never")
    memo: dict[tuple[int, int], object] = {}
    for name, partition in layers.items():
        module = modules[name if name != ROOT else ""]
        rec = adapt(module, family, name)
        leaf = is_leaf(module)
        rec.atomic = rec.atomic or leaf
        groups = tuple(family.mask(g) for g in partition)
        if len(groups) > 1:
            split_parameters(module, groups, buffers=leaf, memo=cast(Value, memo))
            if rec.buffers and rec.stats == "watch":  # a group's tasks may come with values of their own
                rec.stats = "always"


def is_leaf(module: nn.Module) -> bool:
    """Whether a module contains no other one, in its children or in plain attributes."""
    return not module._modules and not any(_holds_module(v, 0) for v in module.__dict__.values())


def _holds_module(value: object, depth: int) -> bool:
    if isinstance(value, nn.Module):
        return True
    if depth < 3 and isinstance(value, (list, tuple, set)):
        return any(_holds_module(v, depth + 1) for v in value)
    if depth < 3 and isinstance(value, dict):
        return any(_holds_module(v, depth + 1) for v in value.values())
    return isinstance(getattr(value, "__self__", None), nn.Module)


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module's buffers are statistics of its inputs, by class or by name."""
    names = [n for n, b in module._buffers.items() if b is not None]
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return bool(names) and (norm or any(n.startswith("running_") or n == "num_batches_tracked" for n in names))


def _maps_op_by_op(module: nn.Module) -> bool:
    """Whether a leaf's forward is one plain PyTorch call, for which mapping that call is the same and costs less."""
    kind = type(module)
    own = kind.__module__.startswith("torch.nn.modules.")
    return own and not has_running_statistics(module) and not isinstance(module, nn.RNNBase)
