"""QM9 as a problem: errors in the targets' units, options that do not exist."""

import pytest
import torch

from reconmtl.errors import ProblemError
from reconmtl.problems import qm9


def test_errors_are_in_the_targets_unit_and_wrong_options_are_named() -> None:
    assert qm9.absolute(3.0)(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])).tolist() == [3.0, 0.0]
    with pytest.raises(ProblemError, match="Nearest: 'alpha'"):
        qm9.make(tasks=["alph"])
    with pytest.raises(ProblemError, match="130,831"):
        qm9.make(molecules=130_831, held_out=1)
