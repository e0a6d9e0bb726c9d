"""From samples to batches: fetch and stack, with targets that may be missing; run a model on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from reconmtl.errors import ProblemError

Targets = dict[str, tuple[Any, Tensor | None]]
"""Per task: the targets that are present, and the positions [n] of their samples in the batch (None: all of them)."""


ALL = ""
"""The key of a data set that all tasks share; a set that one task has for itself is kept under the task's name."""


class Data(Protocol):
    """A map-style data set; items are `(input, {task: target})`, a missing target is an absent key or None."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 inputs are whatever the user's model takes


Sets = Data | Mapping[str, Data]
"""What all tasks share, or `{task: data set}`; items of a task's own set may be `(input, target)`."""


def sets_of(data: Sets) -> dict[str, Data]:
    """The data sets by the task that each belongs to; one that is shared under `ALL`."""
    return dict(data) if isinstance(data, Mapping) else {ALL: data}


@runtime_checkable
class BatchData(Protocol):
    """A data set that can also hand out a whole batch at once, which is faster than stacking items."""

    def batch(self, indices: Tensor, /) -> tuple[Any, Mapping[str, Tensor]]:
        """Return inputs and, per task, targets of the samples at `indices` [n]."""


@runtime_checkable
class Movable(Protocol):
    """A data set that can lie on an accelerator as a whole, so that batches are made there."""

    def on(self, device: torch.device, /) -> Data:
        """The same samples on a device, copied once."""


def fetch(
    data: Data,
    indices: Tensor,
    tasks: Sequence[str] | None,
    collate: Callable[[list[Any]], tuple[Any, Mapping[str, Any]]] | None = None,
    *,
    own: str | None = None,
) -> tuple[Any, Targets]:
    """Make a batch of the samples at `indices` [n].

    Args:
        data: The samples; one with a method `batch` is asked for all of them at once.
        indices: Positions, [n].
        tasks: Whose targets are wanted; None: all there are.
        collate: Makes a batch of a list of items; None stacks them, of each task the targets that are there.
        own: The task that the data set belongs to; targets that are no mapping are that task's.

    Returns:
        The inputs, and per task with any target: the targets, and their positions in the batch (None: all).

    Raises:
        ProblemError: If the items are not `(input, {task: target})`, or cannot be stacked.
    """
    if collate is not None:
        inputs, targets = _complete(_owned(collate([data[int(i)] for i in indices]), own), "`collate`")
    elif isinstance(data, BatchData) and callable(data.batch):
        inputs, targets = _complete(_owned(data.batch(indices), own), f"{type(data).__name__}.batch")
    else:
        inputs, targets = _collate([_owned(data[int(i)], own) for i in indices], tasks)
    return inputs, {t: targets[t] for t in (targets if tasks is None else tasks) if t in targets}


def move(value: Any, device: torch.device) -> Any:  # noqa: ANN401 nested containers of tensors
    """Put what can be moved (tensors, and whatever else has `.to`) on a device; containers keep their structure."""
    return _map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, value)


def leaves(value: Any) -> list[Any]:  # noqa: ANN401 nested containers of tensors
    """What nested containers hold, in order."""
    found: list[Any] = []
    _map(found.append, value)
    return found


def check_outputs(outputs: Any, tasks: Iterable[str]) -> None:  # noqa: ANN401 whatever the model returns
    """Raise a ProblemError unless a model returned an output for each of these tasks."""
    missing = [n for n in tasks if not isinstance(outputs, Mapping) or n not in outputs]
    if missing:
        have = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ProblemError(f"The model should return {{task: output}}; no output for {missing}, found {have}.")


def select(output: Any, at: Tensor | None) -> Any:  # noqa: ANN401 whatever the model returns
    """The rows of an output, or of targets (tensor, or containers of tensors); None takes all as they are."""

    def rows(leaf: Any) -> Any:  # noqa: ANN401
        if not isinstance(leaf, Tensor):
            raise ProblemError(
                "Some samples of a batch are wanted (targets are missing, or halves are compared), but rows cannot "
                f"be taken from an output or target that holds {type(leaf).__name__}; use tensors, or containers of "
                "tensors."
            )
        return leaf[at]

    return output if at is None else _map(rows, output)


def length(values: Any) -> int:  # noqa: ANN401 nested containers of tensors
    """Samples in a batch of targets: the length of its first tensor; 0 without any."""
    found: list[int] = []
    _map(lambda leaf: found.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.ndim else None, values)
    return found[0] if found else 0


def call(model: Callable[..., Any], inputs: Any) -> Any:  # noqa: ANN401 whatever the model takes and returns
    """Run `model(x)` for a tensor, `model(*x)` for a tuple or list, `model(**x)` for a mapping."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401 whatever the model takes
    """Positional and keyword arguments of a model's call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _owned(pair: Any, own: str | None) -> Any:  # noqa: ANN401 of the user
    """An item or a batch of a task's own data set, its targets by task."""
    if own is None or not isinstance(pair, (tuple, list)) or len(pair) != 2 or isinstance(pair[1], Mapping):
        return pair
    return pair[0], {own: pair[1]}


def _complete(batch: Any, source: str) -> tuple[Any, Targets]:  # noqa: ANN401 of the user
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Mapping):
        raise ProblemError(f"{source} should return (inputs, {{task: targets}}), returned {type(batch).__name__}.")
    return batch[0], {task: (values, None) for task, values in batch[1].items() if values is not None}


def _collate(items: list[Any], tasks: Sequence[str] | None) -> tuple[Any, Targets]:
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Mapping):
            raise ProblemError(
                f"Items of a data set should be (input, {{task: target}}), found {type(item).__name__}; "
                "change the data set, or pass `collate=`."
            )
    inputs = _stack([item[0] for item in items], "inputs")
    targets: Targets = {}
    for task in dict.fromkeys(t for item in items for t in item[1]) if tasks is None else tasks:
        present = [i for i, item in enumerate(items) if item[1].get(task) is not None]
        if present:
            values = _stack([items[i][1][task] for i in present], f"targets of task {task!r}")
            targets[task] = (values, None if len(present) == len(items) else torch.tensor(present))
    return inputs, targets


def _stack(values: list[Any], what: str) -> Any:  # noqa: ANN401 nested containers of tensors
    try:
        return default_collate(values)
    except (RuntimeError, TypeError) as error:
        raise ProblemError(f"The {what} of a batch cannot be stacked ({error}); pass `collate=`.") from error


def _map(function: Callable[[Any], Any], value: Any) -> Any:  # noqa: ANN401 nested containers of tensors
    if isinstance(value, Mapping) and not hasattr(value, "to"):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "to"):
        make = getattr(value, "_make", type(value))  # named tuples keep their names
        return make(_map(function, v) for v in value)
    return function(value)
