"""What rewrites or traces models from outside (parametrisation, pruning, quantisation, fx) and cannot see copies."""

import sys
from collections.abc import Callable

import torch

from reconmtl.errors import SplitError

CONVERT = (
    "Convert the model first (parametrisations, pruning, nn.SyncBatchNorm.convert_sync_batchnorm), then split it; or "
    "convert one task's network, `rm.view(model, task).module` (quantisation, fusion)."
)
_CONVERTERS = frozenset(
    f"torch.nn.utils.{name}"
    for name in ("parametrize", "parametrizations", "prune", "weight_norm", "spectral_norm", "fusion")
)
_ASKING = frozenset(("is_parametrized", "type_before_parametrizations"))
_METHODS = {
    "generate": "it decodes one sequence from one task's logits: rm.view(model, task).module.generate(...)",
    "save_pretrained": (
        "it knows nothing of copies, and loading would miss them: save rm.view(model, task).module for each task, or "
        "model.state_dict()"
    ),
    "push_to_hub": "it knows nothing of copies: push rm.view(model, task).module for each task",
}
_LIBRARIES = ("transformers", "huggingface_hub", "diffusers")


def check_asker(name: str) -> None:
    """Refuse a function of PyTorch's that would convert a module with copies; called where a tensor of it is read.

    Args:
        name: Dotted name of the module.

    Raises:
        SplitError: If the code that reads is one of those functions; nothing has changed yet.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_name in _ASKING and frame.f_back is not None:
        frame = frame.f_back
    where, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
    if where in _CONVERTERS or where.startswith("torch.ao.") or function == "convert_sync_batchnorm":
        raise SplitError(
            f"{where}.{function} reached {name} in a split model, whose tensors it cannot convert for each task. "
            f"{CONVERT}"
        )


def check_not_traced() -> None:
    """Refuse `torch.fx.symbolic_trace`, whose graph would lose the tasks.

    Raises:
        SplitError: While fx traces.
    """
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing() and not torch._C._get_dispatch_mode(_PROXY):
        raise SplitError(
            "torch.fx cannot trace a split model symbolically: its values differ between tasks. Trace one task's "
            "network, rm.view(model, task).module, or export: torch.export.export(rm.view(model, task), inputs)."
        )


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def refused_methods(kind: type) -> dict[str, Callable[..., None]]:
    """Methods of other libraries' model classes that call the model, or save it, as if it had one task.

    Args:
        kind: The class of a split model.

    Returns:
        {name: what takes its place and raises}, for those that the class has.
    """
    found = {}
    for name, text in _METHODS.items():
        owner = next((k for k in kind.__mro__ if name in vars(k)), None)
        if owner is not None and owner.__module__.partition(".")[0] in _LIBRARIES:
            found[name] = _refusing(name, text)
    return found


def _refusing(name: str, text: str) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise SplitError(f"{name}() of a split model: {text}.")

    refuse.__name__ = name
    return refuse
