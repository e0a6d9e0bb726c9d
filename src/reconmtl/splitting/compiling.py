"""A split model under torch.compile: it runs as it is, and says so where that is not allowed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reconmtl.errors import SplitError

UNCOMPILED = (
    "A split model runs as it is under torch.compile: values that differ between tasks cannot be traced into one "
    "graph. Compile one task's network, torch.compile(rm.view(model, task), fullgraph=True), or what comes before the "
    "first split layer, model.stem.compile(fullgraph=True); or leave out fullgraph=True."
)
REACHED = (
    "torch.compile cannot trace values that differ between tasks, which reach this compiled module or come from split "
    "layers in it. Compile what comes before the first split layer, or one task's network, "
    "torch.compile(rm.view(model, task)); or compile the whole model, torch.compile(model), which runs as it is."
)


def is_compiler_error(error: BaseException) -> bool:
    """Whether an error comes from torch.compile's tracing of a part of a split model."""
    return any(k.__name__ == "TorchDynamoException" for k in type(error).__mro__)


@contextmanager
def untraced() -> Iterator[None]:
    """Hide from torch.jit.trace what is computed inside; it would become part of its graph."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def check_graph_may_break() -> None:
    """Refuse a compilation that allows no graph break; torch.compile calls this while it traces.

    PyTorch has no public way to ask for that. Where the private one is gone, its own error remains.

    Raises:
        SplitError: Of a class that torch.compile passes on as it is.
    """
    try:
        from torch._dynamo.exc import Unsupported
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        whole = tracer.one_graph or tracer.error_on_graph_break
    except (ImportError, AttributeError):
        return
    if whole:
        kind = type("FullGraphError", (SplitError, Unsupported), {"__doc__": "A split model cannot be one graph."})
        raise kind(UNCOMPILED)


# What torch.compiler.assume_constant_result does, without loading the compiler.
check_graph_may_break._dynamo_marked_constant = True  # type: ignore[attr-defined]
