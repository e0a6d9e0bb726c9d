"""A network, and the whole state of its training, as one safetensors file with JSON in its header; nothing is pickled.

The network's tensors bear their own names, so any tool can load them. While a training runs, what it needs to go on
lies beside them under names that start with `~`; the header says how the pieces belong together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reconmtl.errors import RunError
from reconmtl.files import write_bytes

FORMAT = "reconmtl.checkpoint/1"
MARK = "~"
"""First character of the names of tensors that are not the network's."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        model: The network's state dict.
        about: What was written beside it, plain JSON data.
        training: The state of a training, as it was given to `save_checkpoint`; None if there is none.
    """

    model: dict[str, Tensor]
    about: dict[str, Any]
    training: Any = None


def save_checkpoint(path: Path, model: nn.Module, about: Mapping[str, object], *, training: object = None) -> None:
    """Write a network and, if given, the state of its training.

    Args:
        path: The file; it is replaced as a whole.
        model: Whose state dict is written.
        about: Plain JSON data.
        training: Nested dicts, lists and tuples of tensors, numbers, strings and None.

    Raises:
        RunError: If the file cannot be written, or the state holds anything else.
    """
    tensors = {k: _plain(v) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    wrong = [n for n in tensors if n.startswith(MARK)]
    if wrong:
        raise RunError(f"{path}: a tensor of the network is called {wrong[0]!r}; names that start with '~' are taken.")
    header: dict[str, object] = {"format": FORMAT, "about": dict(about)}
    if training is not None:
        kept = [(n, b) for n, b in model.named_buffers() if n not in tensors]  # those that are not persistent
        header["training"] = pack({"buffers": dict(kept), "state": training}, tensors)
    text = {"reconmtl": json.dumps(header, allow_nan=False)}
    write_bytes(path, lambda temporary: save_file(tensors, temporary, metadata=text))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read everything that a checkpoint holds; nothing in it is run.

    Raises:
        RunError: If the file is missing or damaged; file and field are named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("reconmtl", "")
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 not a dict
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} cannot be read as a checkpoint: {error}.") from None
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: the header's field 'reconmtl' is no JSON: {error}.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path}: field 'format' should be {FORMAT!r}.")
    about = content.get("about")
    if not isinstance(about, dict):
        raise RunError(f"{path}: field 'about' should be an object.")
    model = {k: v for k, v in tensors.items() if not k.startswith(MARK)}
    if "training" not in content:
        return Checkpoint(model, about)
    try:
        found = unpack(content["training"], tensors)
        buffers, state = found["buffers"], found["state"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: field 'training' is damaged ({type(error).__name__}: {error}).") from None
    if not isinstance(buffers, dict) or not all(isinstance(b, Tensor) for b in buffers.values()):
        raise RunError(f"{path}: field 'training' should hold the buffers as tensors.")
    return Checkpoint(model, about, {"buffers": buffers, "state": state})


def restore_model(model: nn.Module, found: Checkpoint, source: Path) -> None:
    """Put a checkpoint's tensors into a network of the same structure.

    Raises:
        RunError: If the network is another one.
    """
    try:
        missing, unexpected = model.load_state_dict(found.model, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise RunError(f"{source} was trained with another network: {' '.join(first[:2])}") from None
    wrong = [n for n in [*missing, *unexpected] if not n.endswith("_extra_state")]
    if wrong:
        raise RunError(f"{source} was trained with another network: {wrong[0]!r} is in one of them only.")
    if found.training is None:
        return
    buffers = dict(model.named_buffers())
    for name, value in found.training["buffers"].items():
        if name not in buffers or buffers[name].shape != value.shape:
            raise RunError(f"{source} was trained with another network: its buffer {name!r} does not fit.")
        buffers[name].copy_(value)


def pack(value: object, tensors: dict[str, Tensor]) -> object:
    """Turn nested containers into plain JSON data; their tensors go into `tensors` under new names.

    Raises:
        RunError: If something cannot be kept.
    """
    if isinstance(value, Tensor):
        name = f"{MARK}{len(tensors)}"
        tensors[name] = _plain(value)
        return {"tensor": name}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) or type(k) is int for k in value):
            raise RunError(
                "The state of this training cannot be kept: a mapping has keys that are no names or numbers."
            )
        return {"dict": [[k, pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "tuple": [pack(v, tensors) for v in value]}
    raise RunError(
        f"The state of this training cannot be kept: it holds a {type(value).__name__}. Optimizers and schedules "
        "may hold tensors, numbers, strings, None and containers of them."
    )


def unpack(packed: object, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 whatever was packed
    """Put together what `pack` took apart.

    Raises:
        KeyError: If a tensor is missing.
        ValueError: If it is nothing that `pack` makes.
    """
    if packed is None or isinstance(packed, (bool, str, int, float)):
        return packed
    if not isinstance(packed, dict) or len(packed) != 1:
        raise ValueError(f"expected an object with one key, found {type(packed).__name__}")
    ((kind, content),) = packed.items()
    if kind == "tensor" and isinstance(content, str) and content.startswith(MARK):
        return tensors[content]
    if kind == "float" and content in ("nan", "inf", "-inf"):
        return float(cast("str", content))
    if kind == "dict" and isinstance(content, list):
        pairs = [(k, unpack(v, tensors)) for k, v in map(_pair, content)]
        return dict(pairs)
    if kind in ("list", "tuple") and isinstance(content, list):
        values = [unpack(v, tensors) for v in content]
        return values if kind == "list" else tuple(values)
    raise ValueError(f"unknown kind {kind!r:.40}")


def _pair(entry: object) -> Sequence[Any]:
    if not isinstance(entry, list) or len(entry) != 2 or not (isinstance(entry[0], str) or type(entry[0]) is int):
        raise ValueError("a mapping should be a list of pairs of a name or number and a value")
    return entry


def _plain(tensor: Tensor) -> Tensor:
    """A copy that safetensors can write: on the CPU, dense, in memory of its own."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise RunError(f"The state of this training cannot be kept: a tensor is {tensor.layout}, not dense.")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()
