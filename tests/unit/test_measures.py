"""Values per sample."""

import torch

from reconmtl.measures import accuracy, classification_error


def test_values_per_sample() -> None:
    logits, target = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 0, 1])
    assert accuracy(logits, target).tolist() == [100.0, 0.0, 0.0]
    assert classification_error(logits, target).tolist() == [0.0, 100.0, 100.0]
