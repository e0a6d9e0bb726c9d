import random

import numpy as np
import pytest
import torch

from reconmtl.randomness import seeded, untouched_randomness


def _draw() -> tuple[float, float, float]:
    return float(torch.rand(1)), float(np.random.rand()), random.random()  # noqa: NPY002 the global state is the point


def test_equal_seeds_draw_equal_numbers_everywhere() -> None:
    with seeded(3):
        first = _draw()
    with seeded(3):
        second = _draw()
    with seeded(4):
        other = _draw()
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("context", [lambda: seeded(3), untouched_randomness])
def test_global_states_come_back_also_after_an_error(context: object) -> None:
    assert callable(context)
    with seeded(7):
        expected = _draw()
    with seeded(7):
        with pytest.raises(ZeroDivisionError), context():
            _draw()
            raise ZeroDivisionError
        assert _draw() == expected
