"""Global random states: seeded inside, and put back as if nothing had been drawn."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from reconmtl.errors import RunError


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Put every global random state back afterwards: PyTorch's on all devices, NumPy's and Python's."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 the user's global state
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch, NumPy and Python inside, and put their global states back afterwards."""
    with untouched_randomness():
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed PyTorch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 a user's transforms may draw from it
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """Every global random state, as tensors, numbers and strings."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 the user's global state
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(d) for d in devices],
        "numpy": {
            "kind": numpy["bit_generator"],
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "python": random.getstate(),
    }


def set_random_states(states: Any) -> None:  # noqa: ANN401 from a file
    """Put back what `random_states` gave.

    Raises:
        RunError: If it is damaged, or of another kind of generator.
    """
    try:
        numpy = states["numpy"]
        key = numpy["key"].numpy().astype(np.uint32)
        legacy = (numpy["kind"], key, numpy["pos"], numpy["has_gauss"], numpy["gauss"])
        random.setstate(states["python"])
        np.random.set_state(legacy)  # noqa: NPY002 the user's global state
        torch.set_rng_state(states["torch"])
        for device, state in enumerate(states["cuda"]):
            torch.cuda.set_rng_state(state, device)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise RunError(f"its random states cannot be put back ({error})") from None
