"""A short mark of a data set, so that results on different data are never put side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reconmtl.randomness import seeded


def mark_of(data: Any) -> str:  # noqa: ANN401 any map-style data set
    """The data set's own string `fingerprint` if it has one; else a digest of its first, middle and last item.

    The items are fetched twice, with the same seeds: one that differs all the same, or cannot be read, marks nothing.
    """
    own = getattr(data, "fingerprint", None)
    if isinstance(own, str):
        return own
    positions = sorted({0, len(data) // 2, len(data) - 1})
    once, again = ([_digest_at(data, i) for i in positions] for _ in range(2))
    return "/".join(a if a == b else "" for a, b in zip(once, again, strict=True))


def _digest_at(data: Any, index: int) -> str:  # noqa: ANN401
    try:
        with seeded(0):  # a transform may be random
            content = _content(data[index])
    except Exception:  # whatever a user's data set raises: training says it better
        return ""
    return hashlib.sha256(content.encode()).hexdigest()


def _content(value: Any) -> str:  # noqa: ANN401 whatever an item holds
    """A value as text that is the same in every process; of an unknown object only the type."""
    kind = type(value).__name__
    if isinstance(value, Tensor) and value.layout is torch.strided:
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return f"{plain.dtype}{list(plain.shape)}{_hash(plain.flatten().view(torch.uint8).numpy())}"
    if hasattr(value, "__array_interface__"):  # NumPy's arrays and numbers, PIL's images
        array = np.asarray(value)
        if not array.dtype.hasobject:
            return f"{array.dtype}{array.shape}{_hash(array)}"
        value = array.tolist()
    if isinstance(value, Mapping):
        return f"{kind}{sorted((_content(k), _content(v)) for k, v in value.items())}"
    if isinstance(value, (list, tuple)):
        return f"{kind}{[_content(v) for v in value]}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, complex, str, bytes)) else kind


def _hash(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
