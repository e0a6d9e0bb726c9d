"""What happens when a module of a split model is called with values that differ between tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import TaskCopies
from reconmtl.splitting.branched import (
    Branched,
    check_untouched,
    collect,
    combine,
    gather,
    make,
    meet,
    missing,
    pick,
    spread,
)
from reconmtl.splitting.faces import Collections, Face, keep_attributes, opened
from reconmtl.splitting.groups import Family, Masks, complete, refine, union
from reconmtl.splitting.mapping import SharedWriteError
from reconmtl.splitting.objects import same_versions, versions
from reconmtl.splitting.refusals import written_state, written_tensor
from reconmtl.splitting.storage import (
    COPIES,
    GroupTensors,
    PerTask,
    Record,
    base_class,
    copies,
    record,
    refine_buffers,
    share_buffers,
)
from reconmtl.splitting.structure import Value, tensors, transform

Plain = Callable[..., Value]
FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules whose inference kernel gives slightly other numbers than their training path; see `_fast_path`."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def call(module: nn.Module, rec: Record, plain: Plain, args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
    """Call a module below the root: pruned to the tasks that it can reach, whole per branch if it is atomic."""
    found = gather(args, kwargs)
    full = rec.family.full
    if rec.owner != full:
        return _owned(module, rec, plain, args, kwargs, found)
    if rec.atomic or _fast_path(module):
        return whole(module, rec, plain, args, kwargs, found)
    if rec.params and isinstance(module, CONTAINERS):
        with opened(module) as face:
            return face(*args, **kwargs)
    return plain(*args, **kwargs)


def _fast_path(module: nn.Module) -> bool:
    """Whether the module would use PyTorch's fused inference kernel; it sees plain tensors only if run per branch."""
    if not isinstance(module, FAST_PATHS) or module.training:
        return False
    return not torch.is_grad_enabled() or not any(p.requires_grad for p in module.parameters())


def _owned(
    module: nn.Module, rec: Record, plain: Plain, args: Sequence[Value], kwargs: dict[str, Value], found: list[Branched]
) -> Value:
    """Compute for the tasks that the module can reach alone; the result exists for them alone."""
    owner, family = rec.owner, rec.family
    masks = meet(found, f"{rec.name}(...)", (owner,)) if found else (owner,)
    if masks == (owner,) and _is_closed(module):  # one branch and one copy: run it untouched, on plain tensors
        check_untouched(found)
        out = plain(*pick(tuple(args), owner), **pick(kwargs, owner))
        return _limit(out, owner, family)

    def limit(t: Value) -> Value:
        return _limit(t, owner, family)

    args, kwargs = transform(tuple(args), limit), transform(kwargs, limit)
    found = gather(args, kwargs)
    if rec.atomic or _fast_path(module):
        return _limit(whole(module, rec, plain, args, kwargs, found), owner, family)
    return _limit(plain(*args, **kwargs), owner, family)


def _limit(value: Value, owner: int, family: Family) -> Value:
    """The structure with every tensor valid for `owner` alone."""

    def leaf(t: Tensor) -> Tensor:
        if type(t) is not Branched:
            return make(family, (owner,), (t,))
        kept = [(m & owner, v) for m, v in zip(t.masks, t.vals, strict=True) if m & owner]
        if not kept:
            raise missing(t, owner)
        if len(kept) == len(t.masks) and all(m == k for m, (k, _) in zip(t.masks, kept, strict=True)):
            return t
        return make(family, tuple(m for m, _ in kept), [v for _, v in kept])

    return transform(value, leaf)


def _is_closed(module: nn.Module) -> bool:
    """Whether a module has neither copies nor user's code in it, which could pass plain values to other modules."""
    for m in module.modules() if module._modules else (module,):
        rec = record(m)
        kind = type(m) if rec is None else base_class(m)
        if m._forward_hooks or m._forward_pre_hooks or not kind.__module__.startswith("torch.nn.modules."):
            return False
        if rec is not None and (rec.params or rec.buffers):
            return False
    return True


def whole(
    module: nn.Module, rec: Record, plain: Plain, args: Sequence[Value], kwargs: dict[str, Value], found: list[Branched]
) -> Value:
    """Run a module whole, once per group of tasks, on plain tensors."""
    partitions = _partitions(module, rec)
    if not found:
        if not partitions:
            return plain(*args, **kwargs)
        masks = refine(*partitions)
        if len(masks) > 1 and prepare(module, masks):
            masks = refine(*_partitions(module, rec))
    else:
        if torch.is_grad_enabled():
            check_untouched(found)
        masks = meet(found, f"{rec.name}(...)", *partitions)
        if prepare(module, masks):
            masks = meet(found, f"{rec.name}(...)", *_partitions(module, rec))
    if masks == (rec.family.full,):
        return plain(*pick(tuple(args), masks[0]), **pick(kwargs, masks[0]))
    return run_faces(module, rec, masks, tuple(args), kwargs)


def run_faces(
    module: nn.Module,
    rec: Record,
    masks: Masks,
    args: tuple[Value, ...],
    kwargs: dict[str, Value],
    *,
    join: Callable[[list[Value]], Value] | None = None,
) -> Value:
    """Call one face per group and combine the results and what the calls assigned."""
    calls = zip(masks, spread(args, kwargs, masks), strict=True)
    if rec.kernel and join is None and not module._forward_hooks and not module._forward_pre_hooks:
        # PyTorch's own leaves neither assign attributes nor change their input
        results = [Face(module, m).module(*own, **keywords) for m, (own, keywords) in calls]
        return combine(results, masks, rec.family, f"{rec.name}(...)")
    watched = watch(module, masks)
    faces: list[Face] = []
    results = []
    seen = _versions(masks, args, kwargs) if len(masks) > 1 else None
    held = versions((args, kwargs)) if len(masks) > 1 else None
    constants = _constants(module) if len(masks) > 1 else []
    shared = _shared_tensors(module, rec) if len(masks) > 1 else []
    collections = Collections(module, rec.name)
    for m, (own, keywords) in calls:
        collections.begin(m)
        face = Face(module, m)
        faces.append(face)
        results.append(face.module(*own, **keywords))
        collections.end()
        _check_constants(constants, m)
        _check_tensors(shared)
        if seen is not None:
            _check_versions(seen, m, rec)
        if held is not None:
            _check_objects(held, (args, kwargs), rec)
    collections.merge(masks, rec.family, outermost=rec.root is not None)
    keep_attributes(faces, masks, rec.family)
    unwatch(watched, module.training)
    if join:
        return join([pick(r, m) for r, m in zip(results, masks, strict=True)])
    return combine(results, masks, rec.family, f"{rec.name}(...)")


# Buffers that a call changes ----------------------------------------------------------------------------------------


def _below(module: nn.Module) -> list[tuple[nn.Module, Record]]:
    if len(module._modules) <= (COPIES in module._modules):
        rec = record(module)
        return [(module, rec)] if rec is not None else []
    return [(m, r) for m in module.modules() if (r := record(m)) is not None]


def _partitions(module: nn.Module, rec: Record) -> list[Masks]:
    if len(module._modules) <= (COPIES in module._modules):
        return [*rec.partitions(), *_held(module, rec)]
    return list(dict.fromkeys(p for m, r in _below(module) for p in (*r.partitions(), *_held(m, r))))


def _held(module: nn.Module, rec: Record) -> list[Masks]:
    """The groups for which attributes of a module hold values of their own."""
    if not rec.held:
        return []
    found: list[Branched] = []
    collect([module.__dict__.get(n) for n in rec.held], found)
    groups = [b.masks for b in found] + [v.masks for n in rec.held if type(v := module.__dict__.get(n)) is PerTask]
    return [complete(masks, rec.family.full) for masks in groups]


def prepare(module: nn.Module, masks: Masks) -> bool:
    """Give running statistics one copy per group of tasks that the module is now called for."""
    changed = False
    for m, r in _below(module):
        if r.stats == "always" and (r.buffers or any(b is not None for b in m._buffers.values())):
            have = r.buffer_groups if r.buffers else (r.family.full,)
            groups = refine(have, complete(masks, r.family.full))
            if groups != have:
                refine_buffers(m, groups)
                changed = True
    return changed


Watched = tuple[nn.Module, list[tuple[Tensor, int, Tensor]]]


def watch(module: nn.Module, masks: Masks) -> list[Watched]:
    """Give buffers of unknown use a copy per group for this call, to see whether it changes them."""
    out = []
    for m, r in _below(module):
        if r.stats == "watch" and any(b is not None for b in m._buffers.values()) and not r.buffers:
            refine_buffers(m, complete(masks, r.family.full))
            held = [c for g in copies(m).values() for c in g._buffers.values() if c is not None]
            out.append((m, [(t, t._version, t.detach().clone()) for t in held]))
    return out


def unwatch(watched: list[Watched], training: bool) -> None:
    """Keep the copies of buffers that the call changed; merge the others again."""
    for m, before in watched:
        r = cast(Record, record(m))
        held = [c for g in copies(m).values() for c in g._buffers.values() if c is not None]
        if any(a is not b or a._version != v or _differ(a, old) for a, (b, v, old) in zip(held, before, strict=True)):
            r.stats = "always"
            continue
        share_buffers(m)
        if training:
            r.stats = "constant"


def _differ(tensor: Tensor, before: Tensor) -> bool:
    """Whether values changed, which kernels do without a note of it: F.batch_norm its statistics, `.data` anything."""
    if tensor.is_meta:
        return False
    same = (tensor.detach() == before) | ((tensor.detach() != tensor.detach()) & (before != before))  # NaN is NaN
    return not bool(same.all())


def _constants(module: nn.Module) -> list[tuple[nn.Module, Record, str, Tensor, int]]:
    """The buffers at or below a module that earlier calls did not change, and how often they were written to."""
    return [
        (m, r, n, b, 0 if b.is_inference() else b._version)
        for m, r in _below(module)
        if r.stats == "constant" and not r.buffers
        for n, b in m._buffers.items()
        if b is not None
    ]


def _check_constants(before: list[tuple[nn.Module, Record, str, Tensor, int]], mask: int) -> None:
    for m, r, n, b, version in before:
        if m._buffers.get(n) is b and (b.is_inference() or b._version == version):
            continue
        r.stats = "watch"
        raise SplitError(
            f"{r.name}.{n} is changed by this call, which earlier ones did not do, so that all tasks share it; it now "
            f"holds what the call for {r.family.label(mask)} left. Load the state from before: from now on each task "
            f"has a buffer of its own. Or use mode='loop'."
        )


def _shared_tensors(module: nn.Module, rec: Record) -> list[tuple[str, Tensor, tuple[int, int]]]:
    """The parameters and plain tensors at or below a module that all tasks share: name, tensor, how it was written."""
    start = "" if rec.root is not None else rec.name
    below = module.named_modules(prefix=start) if module._modules else ((start, module),)
    return [
        (f"{name}.{n}" if name else n, t, written_state(t))
        for name, m in below
        if not isinstance(m, (TaskCopies, GroupTensors))
        for held in (m._parameters, m.__dict__)
        for n, t in held.items()
        if isinstance(t, Tensor) and type(t) is not Branched
    ]


def _check_tensors(before: list[tuple[str, Tensor, tuple[int, int]]]) -> None:
    for name, t, state in before:
        if written_state(t) != state:
            raise SplitError(written_tensor(name))


@dataclass
class _Input:
    """An input tensor, the tasks it belongs to, and how often it was written to."""

    tensor: Tensor
    owner: int
    version: int


def _versions(masks: Masks, args: Value, kwargs: Value) -> list[_Input]:
    """Every input tensor, the tasks it belongs to, and how often it was written to."""
    full = union(masks)
    out: list[_Input] = []
    for t in tensors((args, kwargs)) if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) else args:
        parts = zip(t.masks, t.vals, strict=True) if type(t) is Branched else ((full, t),)
        try:
            out += [_Input(v, m, v._version) for m, v in parts]
        except RuntimeError:  # inference tensors do not count writes
            continue
    return out


def _check_versions(seen: list[_Input], mask: int, rec: Record) -> None:
    for x in seen:
        if x.tensor._version == x.version:
            continue
        if x.owner & ~mask == 0:  # each may change what is its own
            x.version = x.tensor._version
        else:
            raise SharedWriteError(
                f"{rec.name} changes its input in place, but is run once per task ({rec.family.label(mask)} first) on "
                f"an input that tasks share: the next one would see the change. Let {rec.name} compute out of place "
                "(inplace=False), or clone its input before the call."
            )


def _check_objects(before: list[tuple[Value, Tensor, int]], arguments: Value, rec: Record) -> None:
    after = versions(arguments)
    if same_versions(before, after):
        return
    kept = {id(t): v for _, t, v in before}
    kind = next((type(h) for h, t, v in after if kept.get(id(t)) != v), object)
    raise SharedWriteError(
        f"{rec.name} writes into an object that it is called with ({kind.__name__}), but is run once per task: the "
        "next one would see the change. Call it without (a key-value cache: use_cache=False), do not name it in "
        "`atomic`, or call `rm.view(model, task)`."
    )
