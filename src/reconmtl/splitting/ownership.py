"""Which tasks a module can reach, found by one recorded call: the graph from each task's output to parameters."""

import copy
import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import ROOT
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.groups import Family
from reconmtl.splitting.objects import find, same_versions, versions
from reconmtl.splitting.outputs import get_task, is_keyed, task_keys
from reconmtl.splitting.refusals import is_sharded
from reconmtl.splitting.storage import COPIES, GroupTensors, clone, copies, plain_tensors, record, to_plain
from reconmtl.splitting.structure import Value, tensors, transform


def plain_copy(model: nn.Module, mask: int, *, share_buffers: bool) -> nn.Module:
    """A copy of a model's structure in its original classes, with the tensors of one group of tasks.

    Parameters are shared with the model, buffers and plain tensor attributes too if `share_buffers`.

    Raises:
        SplitError: If a part of the model is sharded.
    """
    sharded = next((n for n, m in model.named_modules() if is_sharded(m)), None)
    if sharded is not None:
        raise SplitError(
            f"{sharded or ROOT} is sharded (FSDP), so that the network of one task cannot be made, which a view, "
            "`verify` and the first call need. Give `split(..., sample=batch)` what the model is called with, "
            "then shard."
        )
    memo: dict[int, Value] = {id(p): p for p in model.parameters()}
    for _, _, tensor in plain_tensors(model):
        if share_buffers or isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor
        elif not tensor.is_leaf:  # left over from an earlier forward; deepcopy refuses graph
            memo[id(tensor)] = tensor.detach().clone()
    if share_buffers:
        memo.update({id(b): b for b in model.buffers()})
    twin = copy.deepcopy(model, memo)
    to_plain(twin, mask)
    return twin


def own_inputs(args: Sequence[Value], kwargs: dict[str, Value]) -> tuple[Sequence[Value], dict[str, Value]]:
    """Copies of a call's arguments, so that a recorded call leaves no trace in them."""
    memo: dict[int, Value] = {}
    for t in (*tensors((tuple(args), kwargs)), *(t for t, _ in find((tuple(args), kwargs)))):
        memo[id(t)] = t.detach().clone().requires_grad_(t.requires_grad)
    try:
        return copy.deepcopy((tuple(args), kwargs), memo)
    except Exception:
        return args, kwargs


@dataclass(frozen=True)
class Recorded:
    """What one call of the first task's network, recorded before the first call, has shown.

    Attributes:
        params: {id(parameter): mask of the tasks whose outputs it reaches}; empty if no output has a gradient.
        output: What that network returned, without graph.
        random: Whether it drew random numbers, so that another call returns something else.
        called: {name: tasks reached by what it returned} of the modules that were called; a list of modules never is,
            its items are.
    """

    params: dict[int, int]
    output: Value
    random: bool
    called: dict[str, int]


def _random_state() -> list[Value]:
    numpy: Value = np.random.get_state(legacy=False)  # noqa: NPY002 the user's global state
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), str(numpy), *(t.tolist() for t in (torch.get_rng_state(), *devices))]


def recorded(model: nn.Module, family: Family, args: Sequence[Value], kwargs: dict[str, Value]) -> Recorded:
    """Run the unsplit model once and find which tasks' outputs each parameter reaches.

    Args:
        model: The split model; nothing in it changes, nor does any random state.
        family: Its tasks.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        Which tasks each parameter reaches, first groups' copies standing for all, and what the first task's was.
    """
    with untouched_randomness(), torch.inference_mode(False), torch.enable_grad():
        twin = plain_copy(model, 1, share_buffers=False)
        frozen = [p for p in twin.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
        args, kwargs = own_inputs(args, kwargs)
        try:
            for p in frozen:
                p.requires_grad_(True)
            before = _random_state()
            called = _note_calls(twin)
            out = twin(*args, **kwargs)
            params, masks = reached(_by_task(out, family), twin)
            returned = {name: _union(masks.get(node, 0) for node in nodes) for name, nodes in called.items()}
            return Recorded(params, transform(out, Tensor.detach), before != _random_state(), returned)
        finally:
            for p in frozen:
                p.requires_grad_(False)


def _note_calls(twin: nn.Module) -> dict[str, list[object]]:
    """{name: graph nodes of what it returned} of each module that will be called; the hooks go with their copy."""
    called: dict[str, list[object]] = {}

    def note(name: str, out: Value) -> None:
        called.setdefault(name, []).extend(t.grad_fn for t in tensors(out) if t.grad_fn is not None)

    for name, module in twin.named_modules(remove_duplicate=False):
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(lambda _module, _args, out, name=name: note(name, out))
    return called


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(int.__or__, masks, 0)


def _by_task(out: Value, family: Family) -> list[tuple[Value, int]]:
    if not is_keyed(out, family.tasks):
        return [(out, family.full)]
    index = {t: 1 << i for i, t in enumerate(family.tasks)}
    return [(get_task(out, n), index.get(n, family.full)) for n in task_keys(out)]


def reached(outputs: Sequence[tuple[Value, int]], model: nn.Module) -> tuple[dict[int, int], dict[object, int]]:
    """Propagate task masks from outputs to parameters through the autograd graph, each node once.

    Returns:
        {id(parameter): mask}, and {node of the graph: mask}.
    """
    masks: dict[object, int] = {}
    params: dict[int, int] = {}
    known = {id(p) for p in model.parameters()}
    roots = []
    for value, mask in outputs:
        for t in tensors(value):
            if t.grad_fn is not None:
                masks[t.grad_fn] = masks.get(t.grad_fn, 0) | mask
                roots.append(t.grad_fn)
            elif id(t) in known:
                params[id(t)] = params.get(id(t), 0) | mask
    for node in reversed(_postorder(roots)):
        mask = masks.get(node, 0)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            params[id(variable)] = params.get(id(variable), 0) | mask
        for below, _ in node.next_functions:
            if below is not None:
                masks[below] = masks.get(below, 0) | mask
    return params, masks


def _postorder(roots: Sequence[Value]) -> list[Value]:
    order: list[Value] = []
    seen: set[object] = set()
    for root in roots:
        stack = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(below, False) for below, _ in node.next_functions if below is not None and below not in seen]
    return order


def module_masks(model: nn.Module, seen: Recorded) -> dict[str, int]:
    """{module name: mask of the tasks that it reaches}.

    That is what the parameters at or below it reach; of a module without any that keeps buffers, as a normalisation
    without weight and bias does, what it returned.
    """
    params, masks = (
        seen.params,
        {
            name: seen.called.get(name, 0)
            for name, m in model.named_modules(remove_duplicate=False)
            if m._buffers and next(m.parameters(), None) is None
        },
    )
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        for p in module.parameters(recurse=False):
            masks[name] = masks.get(name, 0) | params.get(id(p), 0)
        if name:
            parent = name.rpartition(".")[0]
            masks[parent] = masks.get(parent, 0) | masks.get(name, 0)
    return masks


class Snapshot:
    """The buffers of a split model, to be put back after a trial call.

    Args:
        model: The model.
        private: Let the trial run on copies, so that not even a version counter of the originals changes.
    """

    def __init__(self, model: nn.Module, *, private: bool = False) -> None:
        self.private = private
        self.saved: dict[int, tuple[nn.Module, dict[str, list[tuple[int, Tensor, Tensor]]]]] = {}
        for module in model.modules():
            if isinstance(module, GroupTensors):
                continue
            rec = record(module)
            mine: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
            for name, b in module._buffers.items():
                if b is not None:
                    mine[name] = [(-1, b, b.detach().clone())]
                    if private:
                        module._buffers[name] = mine[name][0][2]
            if rec is not None and rec.buffers:
                for mask in rec.buffer_groups:
                    child = copies(module)[rec.family.label(mask)]
                    for name in rec.buffers:
                        b = child._buffers[name]
                        assert b is not None
                        twin = b.detach().clone()
                        mine.setdefault(name, []).append((mask, b, twin))
                        if private:
                            child._buffers[name] = twin
            if mine:
                self.saved[id(module)] = (module, mine)

    def restore(self) -> None:
        """Put every buffer back; groups that came into being meanwhile start from what they shared before."""
        for module, mine in self.saved.values():
            rec = record(module)
            split = rec.buffers if rec is not None and COPIES in module._modules else ()
            for name, groups in mine.items():
                if not self.private:
                    with torch.no_grad():
                        for _, tensor, before in groups:
                            tensor.copy_(before)
                if name not in split:
                    module._buffers[name] = groups[0][1]
                    continue
                assert rec is not None
                used: set[int] = set()
                for mask in rec.buffer_groups:
                    source = next(t for m, t, _ in groups if m & mask == mask)
                    child = copies(module)[rec.family.label(mask)]
                    child._buffers[name] = clone(source) if id(source) in used else source
                    used.add(id(source))


class Inputs:
    """The arguments of a trial call, to be put back after it.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def __init__(self, args: Sequence[Value], kwargs: dict[str, Value]) -> None:
        self.given = (tuple(args), kwargs)
        self.tensors = [(t, _writes(t), t.grad_fn, t.detach().clone()) for t in tensors(self.given)]
        self.objects = versions(self.given)

    def restore(self) -> bool:
        """Put back what tensors held; False if something cannot be undone: graph, or an object (a key-value cache)."""
        with torch.no_grad():
            for t, count, node, before in self.tensors:
                if t.grad_fn is not node:  # written in place with values that have a gradient
                    return False
                if _writes(t) != count or t.is_inference():
                    t.copy_(before)
        return same_versions(self.objects, versions(self.given))


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
