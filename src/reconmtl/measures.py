"""How well single samples are solved: functions (output, target) -> one value per sample, for `Metric`."""

from torch import Tensor


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Per sample, 100 where the largest logit is the target's, else 0: its mean is the accuracy in percent. [N]."""
    return (output.argmax(1) == target).float() * 100


def classification_error(output: Tensor, target: Tensor) -> Tensor:
    """Per sample, 0 where the largest logit is the target's, else 100: its mean is the error in percent. [N]."""
    return 100 - accuracy(output, target)
