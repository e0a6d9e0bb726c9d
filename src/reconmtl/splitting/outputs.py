"""What a forward returns, by task: mappings keyed by tasks, objects with fields named by tasks, or anything else."""

import copy
from collections.abc import Mapping, Sequence

import torch

from reconmtl.errors import SplitError, nearest
from reconmtl.splitting.branched import Branched, check_untouched, collect
from reconmtl.splitting.groups import Family
from reconmtl.splitting.objects import holds_branches, unpack
from reconmtl.splitting.structure import Value, tensors, with_items


def is_keyed(out: Value, tasks: Sequence[str]) -> bool:
    """Whether an output is a mapping (or an object with fields) by task name.

    Raises:
        SplitError: If it names some of the tasks, but not all.
    """
    names = task_keys(out)
    if not names:
        return False
    lacking = [t for t in tasks if t not in names]
    if lacking and len(lacking) < len(tasks):
        raise SplitError(
            f"The forward returned outputs for {[t for t in tasks if t in names]}, but none for {lacking}; it returned "
            f"{list(names)[:20]}. {nearest(lacking[0], [str(n) for n in names])} The plan's tasks must be the keys "
            "of the output."
        )
    return not lacking


def task_keys(out: Value) -> list[Value]:
    """The names under which an output holds its parts: keys of a mapping, fields of a named tuple or dataclass."""
    if isinstance(out, Mapping):
        return list(out)
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return list(out._fields)
    if hasattr(out, "__dataclass_fields__") and not isinstance(out, type):
        return list(out.__dataclass_fields__)
    return []


def get_task(out: Value, task: str) -> Value:
    """One part of a keyed output."""
    return out[task] if isinstance(out, Mapping) else getattr(out, task)


def replace_tasks(out: Value, parts: Mapping[str, Value]) -> Value:
    """A keyed output of the same type with other parts."""
    if isinstance(out, Mapping):
        return with_items(out, parts)
    if isinstance(out, tuple):
        return out._replace(**parts)  # type: ignore[attr-defined]
    new = copy.copy(out)
    for name, part in parts.items():
        object.__setattr__(new, name, part)
    return new


def select(out: Value, task: str, tasks: Sequence[str]) -> Value:
    """One task's part of what a plain forward returned."""
    return get_task(out, task) if is_keyed(out, tasks) else out


def assemble(results: Sequence[Value], family: Family) -> Value:
    """What the user sees, out of what one network per task returned."""
    tasks, first = family.tasks, results[0]
    if not is_keyed(first, tasks):
        return dict(zip(tasks, results, strict=True))
    parts = {t: get_task(r, t) for t, r in zip(tasks, results, strict=True)}
    for name in task_keys(first):
        each = [get_task(r, name) for r in results]
        if name not in tasks and any(True for _ in tensors(each)) and not all(e is each[0] for e in each):
            parts[name] = dict(zip(tasks, each, strict=True))
    return replace_tasks(first, parts)


def deliver(out: Value, family: Family) -> Value:
    """Turn what the forward returned into what the user sees: {task: output}, without branched values."""
    found: list[Branched] = []
    collect(out, found)
    if torch.is_grad_enabled():
        check_untouched(found)
    tasks = family.tasks
    if not is_keyed(out, tasks):
        return {t: unpack(out, 1 << i) for i, t in enumerate(tasks)}
    parts = {t: unpack(get_task(out, t), 1 << i) for i, t in enumerate(tasks)}
    for name in task_keys(out):
        if name not in tasks:
            extra: list[Branched] = []
            collect(get_task(out, name), extra)
            if extra or holds_branches(get_task(out, name)):
                parts[name] = {t: unpack(get_task(out, name), 1 << i) for i, t in enumerate(tasks)}
    return replace_tasks(out, parts)
