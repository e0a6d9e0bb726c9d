"""Compare a split model, call by call and gradient by gradient, with one ordinary network per task."""

from dataclasses import dataclass

import torch
from torch import nn

from reconmtl.errors import SplitError
from reconmtl.splitting.adapted import adopt, forget, learn
from reconmtl.splitting.groups import MissingTaskError
from reconmtl.splitting.rehearsal import apart, rehearse
from reconmtl.splitting.storage import Record, record
from reconmtl.splitting.structure import Value

TOGETHER = 4
"""How many tasks are compared at once: the gradients of as many ordinary networks are kept."""


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        modes: The modes in which outputs and gradients were compared, of "train" and "eval"; none on the meta device or
            with an empty batch.
        random: The modes in which the forward draws random numbers even without dropout, or is so sensitive to rounding
            that an ordinary network differs as much from itself, so that nothing can be told.
        output: Largest difference of an output, relative to the largest value of that output.
        gradient: Largest difference of a parameter's gradient, relative to the task's largest gradient.
    """

    modes: tuple[str, ...]
    random: tuple[str, ...]
    output: float
    gradient: float


def call_arguments(sample: object) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """How a model is called with a sample: a tuple as positional, a dict as keyword arguments, else as the only one."""
    if isinstance(sample, dict):
        return (), dict(sample)
    return (tuple(sample), {}) if isinstance(sample, tuple) else ((sample,), {})


def verify(split_model: nn.Module, sample: object) -> Verified:
    """Check on one sample that every task's output and gradient are those of an ordinary network of its own.

    Runs in train mode (with dropout off) and in eval mode, with copies moved apart a little, and puts parameters,
    gradients, buffers, modes and random state back. What the model learns from its first call, it learns here.

    Args:
        split_model: What `split` returned.
        sample: A tensor [B, ...], a tuple of positional or a dict of keyword arguments.

    Returns:
        The largest differences found, all of them rounding.

    Raises:
        SplitError: If anything differs; the message names the task and the output, parameter or buffer.
    """
    rec = record(split_model)
    if rec is None or rec.root is None:
        raise SplitError("verify: expected a model that `split` returned.")
    args, kwargs = call_arguments(sample)
    learned = rec.root.learned
    try:
        with torch.inference_mode(False), torch.enable_grad():
            if not learned:
                teach(split_model, sample)
            try:
                found = _both_modes(split_model, rec, args, kwargs)
            except MissingTaskError:  # found in one mode what does not hold in the other: prune nothing from now on
                forget(split_model)
                found = _both_modes(split_model, rec, args, kwargs)
    except BaseException:
        rec.root.learned = learned
        raise
    if found.modes or found.random:
        rec.root.rehearsed |= {(training, grad) for training in (True, False) for grad in (True, False)}
    return found


def teach(split_model: nn.Module, sample: object) -> None:
    """Let a split model learn from a sample what it would learn from its first call, comparing nothing."""
    args, kwargs = call_arguments(sample)
    pupil = apart(split_model, training=True)
    learn(pupil, args, kwargs)
    adopt(split_model, pupil)


def _both_modes(model: nn.Module, rec: Record, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Verified:
    tasks = rec.family.tasks
    done: list[str] = []
    random: list[str] = []
    output = gradient = 0.0
    for mode in ("train", "eval"):
        found = []
        for i in range(0, len(tasks), TOGETHER):
            some, where, training = tasks[i : i + TOGETHER], f"{mode} mode", mode == "train"
            one = rehearse(model, rec, args, kwargs, tasks=some, where=where, training=training, gradients=True)
            adopt(model, one.model)
            found.append(one)
        if any(f.random for f in found):
            random.append(mode)
        elif not any(f.empty for f in found):
            done.append(mode)
        output, gradient = max(output, *(f.output for f in found)), max(gradient, *(f.gradient for f in found))
    return Verified(tuple(done), tuple(random), output, gradient)
