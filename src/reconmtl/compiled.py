"""A network in training under torch.compile; of a split one all tasks' networks as one graph, shared layers once."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import arguments, call
from reconmtl.buffers import undisturbed
from reconmtl.errors import ReconError, RunError, nearest
from reconmtl.randomness import untouched_randomness
from reconmtl.splitting.adapted import adopt
from reconmtl.splitting.compiling import is_compiler_error
from reconmtl.splitting.objects import DEPTH, is_object
from reconmtl.splitting.outputs import get_task
from reconmtl.splitting.ownership import own_inputs
from reconmtl.splitting.refusals import written_state
from reconmtl.splitting.rehearsal import apart, projected_gradients, random_state
from reconmtl.splitting.storage import MANAGED, RECORD, STANDARD, record
from reconmtl.splitting.structure import ATOMS, children, tensors
from reconmtl.splitting.together import Repeats, noting, together
from reconmtl.splitting.tolerances import KERNELS, Shown, differences

BACKEND = "inductor"
"""What `compile=True` stands for."""
Function = Callable[..., Any]
GRADIENTS = 100.0
"""How much farther than outputs gradients may be apart: terms are added in another order."""


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
    """Calls a network in training as a compiled graph that returns {task: output}.

    A split network is compiled as one function, the networks of its groups of tasks; modules that compute the same for
    several of them run once in it. Before anything is traced, at the first batch and at every one that PyTorch cannot
    run with the graphs that it has, this function is compared with the split network on a copy: outputs, gradients and
    buffers. Split networks that it does not repeat run as they are after a warning, and so do those of which that
    cannot be told: they draw random numbers (dropout), keep something in attributes, or cannot be one graph (their path
    depends on values).

    Args:
        model: Split or not, on the device where it stays.
        tasks: Names of the outputs that are wanted; the graph computes no others.
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
        self._held: list[object] = []  # of a split network: modes and tensors that the compiled function has
        self._repeats: Repeats = {}
        self._gate = _Gate()

    def __call__(self, inputs: Any) -> Any:  # noqa: ANN401 whatever the model takes and returns
        """The outputs of these tasks; all of them if the network runs as it is.

        Raises:
            RunError: If torch.compile cannot compile it.
        """
        if record(self.model) is None:
            self._run = self._run or self._compiled(_outputs(self.model, self.tasks))
        elif not self.why_not and (self._run is None or self._held != _held(self.model)):
            self._together(inputs)
        while not self.why_not:
            assert self._run is not None
            try:
                out = call(self._run, inputs)
                self._gate.open = False
                return out
            except Exception as error:
                asked, self._gate.asked, self._gate.open = self._gate.asked, False, False
                if asked:
                    self._together(inputs, again=True)
                elif _is_kind(error, "FailOnRecompileLimitHit"):
                    self._leave("torch.compile has made too many graphs, as batches are of many kinds")
                elif not is_compiler_error(error):
                    raise
                elif record(self.model) is not None and not _is_kind(error, "BackendCompilerFailed"):
                    self._leave(f"torch.compile cannot make one graph of it ({_reason(error)})")
                else:
                    self._refuse(inputs, error)
        return call(self.model, inputs)

    def _together(self, inputs: Any, *, again: bool = False) -> None:  # noqa: ANN401 whatever the model takes
        """Make the function for a batch, or see that a batch of another kind can have the one that there is."""
        try:
            with untouched_randomness():
                repeats = checked(self.model, self.tasks, inputs)
        except Apart as error:
            self._leave(str(error))
            return
        if again and repeats != self._repeats:
            self._leave("what its tasks have in common depends on the batch")
            return
        if not again:
            self._run = self._compiled(together(self.model, self.tasks, repeats, self._gate.pass_through), whole=True)
            self._held, self._repeats = _held(self.model), repeats
        self._gate.open = True

    def _compiled(self, function: Function, *, whole: bool = False) -> Callable[..., Any]:
        # PyTorch counts how often it compiles a code object, and gives up; each network shall have its own.
        function.__code__ = function.__code__.replace()
        return torch.compile(function, backend=self.backend, fullgraph=whole)

    def _leave(self, why: str) -> None:
        self.why_not, self._run = why, None
        told = f"{type(self.model).__name__} runs as it is, without torch.compile: {why}."
        warnings.warn(told, RuntimeWarning, stacklevel=4)

    def _refuse(self, inputs: Any, error: Exception) -> None:  # noqa: ANN401 whatever the model takes
        with undisturbed(self.model):
            call(self.model, inputs)  # what is wrong with the network itself is told as without compilation
        raise RunError(
            f"torch.compile (backend {self.backend!r}) cannot compile {type(self.model).__name__}: {_told(error)} "
            "Leave out `compile`."
        ) from error


class _Gate:
    """What torch.compile passes whenever it traces a function anew; closed, it stops it before anything has run."""

    def __init__(self) -> None:
        self.open = self.asked = False

    def pass_through(self) -> None:
        if not self.open:
            self.asked = True
            raise RuntimeError("traced before it was checked")

    pass_through._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see check_graph_may_break


def _outputs(model: nn.Module, tasks: Sequence[str]) -> Function:
    """An ordinary network as a function of no more than the wanted outputs: no other has a gradient, not even zeros."""

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 whatever the model takes and returns
        out = model(*args, **kwargs)
        return {t: out[t] for t in tasks if t in out} if isinstance(out, Mapping) else out

    return run


def _held(model: nn.Module) -> list[object]:
    """The modes and tensors of a network; other ones need another compiled function."""
    return [
        x
        for m in model.modules()
        for x in (m.training, *map(id, m._parameters.values()), *map(id, m._buffers.values()))
    ]


def _told(error: Exception) -> str:
    return " ".join(str(error).partition("\n\n")[0].split())[:300]


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].strip(" .")[:150]


def _is_kind(error: Exception, *names: str) -> bool:
    return any(k.__name__ in names for k in type(error).__mro__)  # importing the classes would load the compiler


# Is it the same? ------------------------------------------------------------------------------------------------------


class Apart(Exception):
    """Why a split network cannot run as one function."""


def checked(model: nn.Module, tasks: Sequence[str], inputs: Any) -> Repeats:  # noqa: ANN401 whatever the model takes
    """Compare a split network with one function of its tasks' networks, on a copy whose task copies are moved apart.

    Args:
        model: The split network; nothing in it changes, but it learns what it would learn from its first call.
        tasks: Names of the outputs.
        inputs: A batch.

    Returns:
        Which modules that function runs once for several networks.

    Raises:
        Apart: If they differ, or nothing can be told.
    """
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise Apart("its SyncBatchNorms wait for other processes, which need not look at the same batches")
    try:
        twin = _taught(model, inputs, moved=True)
    except ReconError:
        raise
    except Exception:  # it does not stand moved copies (a matrix that is no covariance any more)
        twin = _taught(model, inputs, moved=False)
    adopt(model, twin)
    mine = _own(inputs)
    with undisturbed(twin):
        written, kept, random = _states(mine), _attributes(twin), random_state()
        call(twin, mine)
        if random != random_state():
            raise Apart("its forward draws random numbers (dropout)")
        if name := _changed(kept, _attributes(twin)):
            raise Apart(f"its forward keeps something in an attribute ({name})")
        if written != _states(mine):
            raise Apart("its forward writes to its inputs")
    noted = apart(model, moved=False, dropout=True)  # that it is watched leaves traces in what it learns
    with noting(noted) as repeats:
        call(noted, _own(inputs))
    expected = _show(twin, twin, tasks, inputs)
    try:
        found = _show(twin, together(twin, tasks, repeats), tasks, inputs)
        limits = _limits(twin)
        far = [d for d in differences(found, expected, "compiled") if not d.size <= limits[d.kind]]
    except Exception as error:
        raise Apart(f"its tasks' networks do not run one by one ({_reason(error)})") from error
    if far:
        raise Apart(f"its tasks depend on each other in a way that their networks do not repeat ({far[0].at})")
    return repeats


def _taught(model: nn.Module, inputs: Any, *, moved: bool) -> nn.Module:  # noqa: ANN401 whatever the model takes
    """A copy that has been called until it knows which buffers need copies: what has them gives others their need."""
    twin = apart(model, moved=moved, dropout=True)
    while True:
        known = [n for n, _ in twin.named_buffers()]
        call(twin, _own(inputs))
        if known == [n for n, _ in twin.named_buffers()]:
            return twin


def _own(inputs: Any) -> Any:  # noqa: ANN401 whatever the model takes
    """Copies of a batch, which a forward may write to."""
    args, kwargs = own_inputs(*arguments(inputs))
    return kwargs or tuple(args)


def _states(inputs: Any) -> list[object]:  # noqa: ANN401 whatever the model takes
    return [written_state(t) for t in tensors(inputs)]


def _show(twin: nn.Module, network: Callable[..., Any], tasks: Sequence[str], inputs: Any) -> Shown:  # noqa: ANN401
    """Outputs, gradients and buffers of one step, without graph."""
    with undisturbed(twin):
        out = call(network, _own(inputs))
        outputs = [t for task in tasks for t in tensors(get_task(out, task))]
        params = {n: p for n, p in twin.named_parameters() if p.requires_grad}
        try:
            grads = projected_gradients(outputs, params, retain=False)
        except RuntimeError:  # of some output there is none; nothing says that it is trained
            grads = None
        buffers = {n: b.detach().clone() for n, b in twin.named_buffers()}
    return Shown([t.detach() for t in outputs], grads, buffers)


def _limits(model: nn.Module) -> dict[str, float]:
    """How far outputs, gradients and buffers may be apart."""
    kinds = {p.dtype for p in model.parameters()}
    for device in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
    limit = max(KERNELS.get(k, 0.0) for k in kinds)
    return {"output": limit, "buffer": limit, "gradient": min(GRADIENTS * limit, KERNELS[torch.bfloat16])}


Attribute = tuple[str, object, object]
"""Where something is kept, what it is, and how it was written."""


def _attributes(model: nn.Module) -> list[Attribute]:
    """What modules hold besides parameters, buffers and modules; also inside of containers and objects."""
    return [
        kept
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key not in MANAGED and key not in STANDARD and key != RECORD
        for kept in _leaves(f"{name}.{key}".lstrip("."), value, 0)
    ]


def _leaves(name: str, value: Any, depth: int) -> Iterator[Attribute]:  # noqa: ANN401 any attribute
    yield name, value, written_state(value) if isinstance(value, Tensor) else _length(value)
    if depth < DEPTH and not isinstance(value, nn.Module):
        for member in children(value) or (vars(value).values() if is_object(value) else ()):
            yield from _leaves(name, member, depth + 1)


def _length(value: Any) -> int | None:  # noqa: ANN401 any attribute
    return len(value) if isinstance(value, (set, list, tuple, Mapping)) else None


def _changed(before: list[Attribute], after: list[Attribute]) -> str:
    """The first attribute that is not as it was; "" if all are."""
    for (name, a, state), (other, b, now) in zip(before, after, strict=False):
        same = a is b or (type(a) in ATOMS and type(a) is type(b) and a == b)
        if name != other or not same or state != now:
            return name
    return "" if len(before) == len(after) else (max(before, after, key=len)[-1][0])
