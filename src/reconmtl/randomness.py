"""Global random states: seeded inside, and put back as if nothing had been drawn."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 a user's transforms may draw from it
        random.seed(seed)
        yield
