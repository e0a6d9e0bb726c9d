"""A network in training under torch.compile; of a split one all tasks' networks as one graph, shared layers once."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import call, map_leaves
from reconmtl.buffers import undisturbed
from reconmtl.errors import RunError, nearest
from reconmtl.randomness import random_states
from reconmtl.splitting.compiling import is_compiler_error
from reconmtl.splitting.groups import refine
from reconmtl.splitting.outputs import get_task
from reconmtl.splitting.ownership import plain_copy
from reconmtl.splitting.storage import copies, record

BACKEND = "inductor"
"""What `compile=True` stands for."""
TOLERANCE = 1e-5
"""Difference, relative to the largest value, at which two ways to compute one network are no longer the same."""


def compile_faults(backend: str, device: torch.device) -> list[str]:
    """Why torch.compile cannot be used on a device, as sentences; empty if it can."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        return [f"compile = {backend!r}: torch.compile has no such backend. {nearest(backend, known)}"]
    if backend != BACKEND:
        return []
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return ["compile: torch.compile on a CPU needs a C++ compiler. Install one (`apt install g++`)."]
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return ["compile: torch.compile on a GPU needs Triton. Install it: pip install triton"]
    return []


class Compiled:
    """Calls a network in training as a compiled graph.

    A split network is compiled as one graph of its tasks' networks; modules that compute the same for every task run
    once in it. Whether that is what the split network computes is looked at on a copy at the first batch. Split
    networks of which it is not, and those that draw random numbers (dropout), which cannot be compared, run as they are
    after a warning.

    Args:
        model: Split or not, on the device where it stays.
        tasks: Names of the outputs.
        backend: Of torch.compile.

    Attributes:
        why_not: Why the network runs as it is; "" if it does not. Known after the first call.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], backend: str = BACKEND) -> None:
        self.model = model
        self.tasks = tuple(tasks)
        self.backend = backend
        self.why_not = ""
        self._run: Callable[..., Any] | None = None

    def __call__(self, inputs: Any) -> Any:  # noqa: ANN401 whatever the model takes and returns
        """The network's outputs.

        Raises:
            RunError: If torch.compile cannot compile it.
        """
        if self._run is None:
            whole = self.model if record(self.model) is None else self._together(inputs)
            self._run = self.model if whole is None else torch.compile(whole, backend=self.backend)
            if self.why_not:
                told = f"{type(self.model).__name__} runs as it is, without torch.compile: {self.why_not}."
                warnings.warn(told, RuntimeWarning, stacklevel=2)
        try:
            return call(self._run, inputs)  # type: ignore[arg-type]  # torch.compile returns what it was given
        except Exception as error:
            if not is_compiler_error(error):
                raise
            with undisturbed(self.model):
                call(self.model, inputs)  # what is wrong with the network itself is told as without compilation
            told = " ".join(str(error).partition("\n\n")[0].split())
            raise RunError(
                f"torch.compile (backend {self.backend!r}) cannot compile {type(self.model).__name__}: {told[:300]} "
                "Leave out `compile`."
            ) from error

    def _together(self, inputs: Any) -> nn.Module | None:  # noqa: ANN401 whatever the model takes
        """The tasks' views as one module; None, with the reason kept, if it would not be the same."""
        twin = copy.deepcopy(self.model)
        _set_apart(twin)
        with undisturbed(twin):
            before = random_states()
            expected = call(twin, inputs)
            drawn = not _same(before, random_states())
            moved = _buffers(twin)
        if drawn:
            self.why_not = "its forward draws random numbers (dropout)"
            return None
        with undisturbed(twin):
            common = _common(twin, inputs)
        trial = Together(twin, self.tasks, common)
        with undisturbed(twin):
            found = call(trial, inputs)
            left = _buffers(twin)
        wrong = [t for t in self.tasks if not _near(get_task(expected, t), found[t])]
        if wrong or moved.keys() != left.keys() or any(not _near(moved[n], left[n]) for n in moved):
            self.why_not = "its tasks depend on each other in a way that one graph of their networks does not repeat"
            return None
        return Together(self.model, self.tasks, common)


class Together(nn.Module):
    """The networks of a split network's groups of tasks as one module, for torch.compile.

    Args:
        model: The split network, whose tensors it shares.
        tasks: Names of the outputs.
        common: Names of modules that compute the same for every task; they run once, for the first group.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], common: Sequence[str]) -> None:
        super().__init__()
        networks = _networks(model)
        self.networks = nn.ModuleList(networks.values())
        self.tasks = [[t for t in names if t in tasks] for names in networks]
        self.kept = [_Kept() for _ in common]
        for i, network in enumerate(self.networks):
            for name, kept in zip(common, self.kept, strict=True):
                module = network.get_submodule(name)
                module.forward = kept.keeping(module.forward) if i == 0 else kept.repeat

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 as the model
        """{task: output}."""
        found = {}
        for tasks, network in zip(self.tasks, self.networks, strict=True):
            for kept in self.kept:
                kept.next = 0
            out = network(*args, **kwargs)
            for task in tasks:
                found[task] = get_task(out, task)
        for kept in self.kept:
            kept.values.clear()
        return found


def _networks(model: nn.Module) -> dict[tuple[str, ...], nn.Module]:
    """Tasks that agree on every copy -> their network, in its original classes, sharing every tensor."""
    records = [rec for m in model.modules() if (rec := record(m)) is not None]
    family = records[0].family
    groups = refine((family.full,), *(p for rec in records for p in rec.partitions()))
    return {family.names(g): plain_copy(model, g, share_buffers=True) for g in groups}


class _Kept:
    """What one module returned, call by call; handed out as clones, which a network may change in place."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next = 0

    def keeping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 as the module
            value = forward(*args, **kwargs)
            self.values.append(value)
            return _cloned(value)

        return keep

    def repeat(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 as the module
        del args, kwargs  # they are those of the first network
        self.next += 1
        return _cloned(self.values[self.next - 1])


def _cloned(value: Any) -> Any:  # noqa: ANN401 as the module
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _set_apart(model: nn.Module) -> None:
    """Move every copy of a split layer by a little of its own: where tasks still agree, nothing of theirs has been."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            rec = record(module)
            if rec is None or not rec.params:
                continue
            for p in copies(module).parameters():
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.add_(noise * (0.01 + 0.1 * p.abs().mean()))


def _common(model: nn.Module, inputs: Any) -> list[str]:  # noqa: ANN401 whatever the model takes
    """The outermost modules that get and give the same in every group's network, call by call."""
    seen = []
    for network in _networks(model).values():
        calls: dict[str, list[Any]] = {}
        hooks = [m.register_forward_hook(_noting(calls, n), with_kwargs=True) for n, m in network.named_modules()]
        call(network, inputs)
        for hook in hooks:
            hook.remove()
        seen.append(calls)
    first, others = seen[0], seen[1:]
    same = {n for n, calls in first.items() if None not in calls and all(o.get(n) == calls for o in others)}
    return [n for n in first if n in same and n and not any(n.startswith(f"{o}.") for o in same)]


def _noting(calls: dict[str, list[Any]], name: str) -> Callable[..., None]:
    def note(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ANN401 as the module
        calls.setdefault(name, []).append(_digest((args, kwargs, out)))

    return note


def _digest(value: Any) -> Any:  # noqa: ANN401 anything
    """A few numbers that tell values apart; None where they cannot."""
    if isinstance(value, Tensor):
        flat = value.detach().double().flatten()
        weights = torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device)
        return (tuple(value.shape), value.dtype, float(flat.sum()), float(flat @ weights))
    if value is None or isinstance(value, (int, float, str)):
        return (value,)
    if isinstance(value, Mapping):
        value = [x for pair in value.items() for x in pair]
    if isinstance(value, (tuple, list)):
        parts = [_digest(v) for v in value]
        return None if None in parts else (len(parts), *parts)
    return None


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.detach().clone() for n, b in model.named_buffers()}


def _same(before: Any, after: Any) -> bool:  # noqa: ANN401 nested states
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return all(_same(before[k], after[k]) for k in before)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(_same(a, b) for a, b in zip(before, after, strict=True))
    return bool(before == after)


def _near(expected: Any, found: Any) -> bool:  # noqa: ANN401 outputs of the user's network
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or expected.shape != found.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(expected, found)
        a, b = expected.detach().double(), found.detach().double()
        return bool((a - b).abs().max() <= TOLERANCE * a.abs().max()) if a.numel() else True
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(found) and all(_near(a, b) for a, b in zip(expected, found, strict=True))
    if isinstance(expected, Mapping):
        return expected.keys() == found.keys() and all(_near(expected[k], found[k]) for k in expected)
    return True
