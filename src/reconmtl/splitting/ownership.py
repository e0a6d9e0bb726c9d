"""Which tasks a module can reach, found by one recorded call: the graph from each task's output to parameters."""

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from reconmtl.errors import SplitError
from reconmtl.layers import ROOT
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.branched import Branched, make
from reconmtl.splitting.groups import Family
from reconmtl.splitting.objects import find
from reconmtl.splitting.outputs import get_task, is_keyed, task_keys
from reconmtl.splitting.refusals import is_sharded, written_state, written_tensor
from reconmtl.splitting.storage import MANAGED, plain_tensors, to_plain
from reconmtl.splitting.structure import Value, tensors


def plain_copy(model: nn.Module, mask: int, *, share_buffers: bool) -> nn.Module:
    """A copy of a model's structure in its original classes, with the tensors of one group of tasks.

    Parameters are shared with the model, buffers and plain tensor attributes too if `share_buffers`.

    Raises:
        SplitError: If a part of the model is sharded.
    """
    memo = kept(model)
    if share_buffers:
        memo.update({id(t): t for _, _, t in plain_tensors(model)})
        memo.update({id(b): b for b in model.buffers()})
    twin = copied(model, memo)
    to_plain(twin, mask)
    return twin


def copied(model: nn.Module, memo: dict[int, Value]) -> nn.Module:
    """A deepcopy of a model.

    Raises:
        SplitError: If something that it holds cannot be copied; the message names it.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        for name, module in model.named_modules():
            for key, value in module.__dict__.items():
                if key not in MANAGED and not _copies(value, memo):
                    raise SplitError(
                        f"{name or ROOT}.{key} ({type(value).__name__}) cannot be copied ({str(error)[:200]}), so that "
                        "neither can the model, which splitting it, a view, `verify` and the first call need. Keep it "
                        "outside of the model, or give its class a __deepcopy__ (which may return itself)."
                    ) from error
        raise


def _copies(value: Value, memo: dict[int, Value]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def kept(model: nn.Module) -> dict[int, Value]:
    """What a deepcopy of a model's structure takes over as it is: parameters; and attributes without their graph.

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
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor
        elif type(tensor) is Branched:  # likewise, of each group
            parts = [v if v.is_leaf else v.detach().clone() for v in tensor.vals]
            memo[id(tensor)] = make(tensor.family, tensor.masks, parts)
        elif not tensor.is_leaf:  # left over from an earlier forward; deepcopy refuses graph
            memo[id(tensor)] = tensor.detach().clone()
    return memo


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
        called: {name: tasks reached by what it returned} of the modules that were called; a list of modules never is,
            its items are.
    """

    params: dict[int, int]
    called: dict[str, int]


def recorded(model: nn.Module, family: Family, args: Sequence[Value], kwargs: dict[str, Value]) -> Recorded:
    """Run the unsplit model once and find which tasks' outputs each parameter reaches.

    Args:
        model: The split model; nothing in it changes, nor does any random state.
        family: Its tasks.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        Which tasks each parameter reaches, first groups' copies standing for all.
    """
    with untouched_randomness(), torch.inference_mode(False), torch.enable_grad(), unwritten(model):
        try:
            with saved_tensors_hooks(lambda _: None, _gone):  # the graph is read, not run: it need not keep values
                return _recorded(model, family, args, kwargs)
        except Exception:  # a forward that differentiates by itself needs them
            return _recorded(model, family, args, kwargs)


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Calls of copies of a model, which share its parameters.

    Raises:
        SplitError: If they wrote to one.
    """
    before = {name: (p, written_state(p)) for name, p in model.named_parameters()}
    try:
        yield
    finally:
        for name, (p, state) in before.items():
            if written_state(p) != state:
                raise SplitError(written_tensor(name))


def _gone(_: object) -> Tensor:
    raise RuntimeError("values were not kept")


def _recorded(model: nn.Module, family: Family, args: Sequence[Value], kwargs: dict[str, Value]) -> Recorded:
    twin = plain_copy(model, 1, share_buffers=False)
    frozen = [p for p in twin.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    args, kwargs = own_inputs(args, kwargs)
    try:
        for p in frozen:
            p.requires_grad_(True)
        called = _note_calls(twin)
        out = twin(*args, **kwargs)
        params, masks = reached(_by_task(out, family), twin)
        returned = {name: _union(masks.get(node, 0) for node in nodes) for name, nodes in called.items()}
        called.clear()  # a checkpoint in the graph holds modules, their hooks this: a circle that nobody collects
        return Recorded(params, returned)
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
