"""What the user brings: a network, tasks with losses and metrics, data, and how to train."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from reconmtl.errors import PlanError, ProblemError, UnknownNameError, nearest
from reconmtl.plan import check_tasks

Targets = dict[str, tuple[Tensor, Tensor | None]]
"""Per task: the targets that are present, and the positions [n] of their samples in the batch (None: all of them)."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Data(Protocol):
    """A map-style data set; items are `(input, {task: target})`, a missing target is an absent key or None."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 inputs are whatever the user's model takes


@runtime_checkable
class BatchData(Protocol):
    """A data set that can also hand out a whole batch at once, which is faster than stacking items."""

    def batch(self, indices: Tensor, /) -> tuple[Any, Mapping[str, Tensor]]:
        """Return inputs and, per task, targets of the samples at `indices` [n]."""


@dataclass(frozen=True)
class Metric:
    """How well a task is solved.

    Args:
        name: Name, unique within its task.
        fn: A function (output, target) -> one value per sample [N], averaged over all samples that have the target; or
            a factory, called without arguments, of an object with `update(output, target)` and `compute()` such as a
            `torchmetrics.Metric`.
        best: "max" if higher is better, "min" if lower is better.
    """

    name: str
    fn: Callable[..., Any]
    best: Literal["max", "min"] = field(kw_only=True)

    @property
    def arrow(self) -> str:
        """The direction as the field's tables print it."""
        return "↑" if self.best == "max" else "↓"

    @property
    def is_factory(self) -> bool:
        """Whether `fn` makes a stateful metric instead of returning values per sample."""
        try:
            parameters = inspect.signature(self.fn).parameters.values()
        except ValueError:  # builtins without a signature take (output, target)
            return False
        needed = [
            p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return not needed and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


@dataclass(frozen=True)
class Task:
    """One task of a problem.

    Args:
        name: The key of its output and its targets.
        loss: A function (output, target) -> scalar, the mean over the samples given.
        metrics: How it is judged; empty for a task that is only trained.
        weight: Multiplies the loss before everything else.
    """

    name: str
    loss: Callable[[Any, Any], Tensor] = field(kw_only=True)
    metrics: Sequence[Metric] = field(default=(), kw_only=True)
    weight: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs: Passes over the training set.
        batch_size: Samples per step.
        optimizer: "sgd", "adam", "adamw", or a function (param_groups, lr=...) -> optimizer.
        lr: Learning rate of the first epoch.
        momentum: Of SGD.
        weight_decay: Passed to the optimizer.
        milestones: Epochs after which the learning rate is multiplied by `gamma`.
        gamma: See milestones.
        param_groups: A function (model) -> parameter groups of the optimizer; None trains all parameters alike.
        drop_last: Leave out the last, smaller batch of an epoch.
    """

    epochs: int
    batch_size: int
    optimizer: str | Callable[..., torch.optim.Optimizer] = "sgd"
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    param_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    drop_last: bool = True

    def __post_init__(self) -> None:
        faults = []
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                faults.append(f"{name} = {value!r}: expected a whole number of at least 1")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                faults.append(f"{name} = {value!r}: expected a number that is not negative")
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            faults.append(f"optimizer = {self.optimizer!r}: unknown. {nearest(self.optimizer, OPTIMIZERS).rstrip('.')}")
        if self.momentum and self.optimizer != "sgd":
            faults.append(f"momentum = {self.momentum!r} belongs to 'sgd', not to {self.optimizer!r}")
        if list(self.milestones) != sorted(set(self.milestones)):
            faults.append(f"milestones = {self.milestones!r}: expected rising epochs")
        if faults:
            raise ProblemError("This recipe cannot be trained: " + "; ".join(faults) + ".")

    def override(self, **changes: Any) -> Recipe:  # noqa: ANN401 any field
        """The recipe with some fields changed; unknown names are answered with the nearest.

        Raises:
            UnknownNameError: If there is no such field.
        """
        known = [f.name for f in fields(self)]
        unknown = [n for n in changes if n not in known]
        if unknown:
            raise UnknownNameError("; ".join(f"a recipe has no field {n!r}. {nearest(n, known)}" for n in unknown))
        return replace(self, **changes)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of a model: all of its parameters, or the groups that `param_groups` returns."""
        groups = [{"params": list(model.parameters())}] if self.param_groups is None else self.param_groups(model)
        if callable(self.optimizer):
            return self.optimizer(groups, lr=self.lr)
        options = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        return OPTIMIZERS[self.optimizer](groups, lr=self.lr, weight_decay=self.weight_decay, **options)

    def to_dict(self) -> dict[str, object]:
        """The recipe as plain JSON data; functions by their qualified name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: getattr(v, "__qualname__", repr(v)) if callable(v) else v for n, v in values.items()}


class Problem:
    """A multi-task learning problem.

    Args:
        model: A function without arguments that builds the joint network anew; `model(x)` returns {task: output}.
        tasks: The tasks, at least one.
        train: Training set; items are (input, {task: target}).
        test: Test set, likewise.
        recipe: How to train.
        val: Validation set; evaluated beside the test set, never used to choose anything.
        single: A function (task name) -> network for single-task training; None uses the joint network.
        collate: A function (list of items) -> (inputs, {task: targets}); None stacks, leaving out missing targets.
        shared: Names or globs of the shared layers, only needed where compiled regions hide the graph.
        name: Shown in tables and files.

    Raises:
        ProblemError: If anything is missing or contradicts itself; every fault is listed.
    """

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        tasks: Sequence[Task],
        train: Data,
        test: Data,
        recipe: Recipe,
        val: Data | None = None,
        single: Callable[[str], nn.Module] | None = None,
        collate: Callable[[list[Any]], tuple[Any, Mapping[str, Any]]] | None = None,
        shared: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        faults = []
        if isinstance(model, nn.Module) or not callable(model):
            faults.append(
                "model: expected a function that builds the network, e.g. `lambda: Net()`, got "
                f"{type(model).__name__}; every training starts from a fresh one"
            )
        try:
            check_tasks(t.name for t in tasks)
        except PlanError as error:
            faults.append(f"tasks: {error}")
        for task in tasks:
            doubled = {m.name for m in task.metrics if sum(m.name == o.name for o in task.metrics) > 1}
            faults += [f"task {task.name!r}: two metrics are called {m!r}" for m in sorted(doubled)]
            faults += [
                f"task {task.name!r}, metric {m.name!r}: best = {m.best!r}, expected 'max' or 'min'"
                for m in task.metrics
                if m.best not in ("max", "min")
            ]
            if not task.weight > 0:
                faults.append(f"task {task.name!r}: weight = {task.weight!r}, expected a positive number")
        for what, data in (("train", train), ("test", test), *((("val", val),) if val is not None else ())):
            if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
                faults.append(f"{what}: expected a map-style data set with len() and [], got {type(data).__name__}")
            elif len(data) == 0:
                faults.append(f"{what}: the data set is empty")
        if faults:
            raise ProblemError("This problem cannot be trained:\n- " + "\n- ".join(faults))
        if hasattr(train, "__len__") and recipe.drop_last and len(train) < recipe.batch_size:
            raise ProblemError(
                f"The training set has {len(train)} samples, fewer than one batch of {recipe.batch_size}, and "
                "drop_last leaves such a batch out: lower batch_size or pass drop_last=False."
            )
        self.model = model
        self.tasks = tuple(tasks)
        self.train = train
        self.test = test
        self.recipe = recipe
        self.val = val
        self.single = single
        self.collate = collate
        self.shared = shared
        self.name = name or "problem"

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(t.name for t in self.tasks)

    def task(self, name: str) -> Task:
        """The task of that name; an unknown one is answered with the nearest.

        Raises:
            UnknownNameError: If there is no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise UnknownNameError(f"Unknown task {name!r}. {nearest(name, self.task_names)}")

    def restrict(self, tasks: Sequence[str]) -> Problem:
        """The same problem with only some of its tasks, in the given order.

        Raises:
            UnknownNameError: If one of them does not exist; all unknown ones are named.
        """
        unknown = [t for t in tasks if t not in self.task_names]
        if unknown:
            raise UnknownNameError(" ".join(f"Unknown task {t!r}. {nearest(t, self.task_names)}" for t in unknown))
        return self.replace(tasks=[self.task(t) for t in tasks])

    def replace(self, **changes: Any) -> Problem:  # noqa: ANN401 any argument
        """The same problem with some arguments changed."""
        names = ("model", "tasks", "train", "test", "recipe", "val", "single", "collate", "shared", "name")
        return Problem(**{**{n: getattr(self, n) for n in names}, **changes})

    def fingerprint(self) -> str:
        """A short name of the data and its split: runs with different ones cannot be compared."""
        parts = [self.name]
        for data in (self.train, self.test):
            parts += [str(getattr(data, "fingerprint", "")), str(len(data))]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]

    def batch(self, data: Data, indices: Tensor, device: torch.device) -> tuple[Any, Targets]:
        """Fetch a batch.

        Args:
            data: One of the problem's data sets.
            indices: Positions of the samples, [n].
            device: Where the tensors go.

        Returns:
            The inputs, and per task that any sample has a target for: the targets and their positions in the batch.

        Raises:
            ProblemError: If the items are not `(input, {task: target})`.
        """
        targets: Mapping[str, Any]
        if isinstance(data, BatchData) and self.collate is None:
            inputs, targets = data.batch(indices)
        else:
            items = [data[int(i)] for i in indices]
            inputs, targets = self.collate(items) if self.collate is not None else _collate(items, self.task_names)
        found: Targets = {}
        for name in self.task_names:
            target = targets.get(name)
            if target is None:
                continue
            values, at = target if isinstance(target, tuple) else (target, None)
            found[name] = (_move(values, device), None if at is None else at.to(device))
        return _move(inputs, device), found

    def losses(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Weighted loss of each task that the batch has targets for.

        Raises:
            ProblemError: If the model's output has no entry for a task.
        """
        missing = [n for n in targets if not isinstance(outputs, Mapping) or n not in outputs]
        if missing:
            have = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ProblemError(f"The model should return {{task: output}}; no output for {missing}, found {have}.")
        return {
            task.name: task.loss(select(outputs[task.name], at), values) * task.weight
            for task in self.tasks
            if task.name in targets
            for values, at in [targets[task.name]]
        }


def select(output: Any, at: Tensor | None) -> Any:  # noqa: ANN401 whatever the model returns
    """The rows of an output (tensor, or containers of tensors) that have a target."""
    if at is None:
        return output
    if isinstance(output, Tensor):
        return output[at]
    if isinstance(output, Mapping):
        return {k: select(v, at) for k, v in output.items()}
    return tuple(select(v, at) for v in output)


def call(model: nn.Module, inputs: Any) -> Any:  # noqa: ANN401 whatever the model takes and returns
    """Run `model(x)` for a tensor, `model(*x)` for a tuple or list, `model(**x)` for a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _collate(items: list[Any], tasks: Sequence[str]) -> tuple[Any, dict[str, tuple[Any, Tensor | None]]]:
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Mapping):
            raise ProblemError(
                f"Items of a data set should be (input, {{task: target}}), found {type(item).__name__}; "
                "change the data set, or pass `collate=`."
            )
    inputs = default_collate([item[0] for item in items])
    targets: dict[str, tuple[Any, Tensor | None]] = {}
    for task in tasks:
        present = [i for i, item in enumerate(items) if item[1].get(task) is not None]
        if present:
            values = default_collate([items[i][1][task] for i in present])
            targets[task] = (values, None if len(present) == len(items) else torch.tensor(present))
    return inputs, targets


def _move(value: Any, device: torch.device) -> Any:  # noqa: ANN401 nested containers of tensors
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _move(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_move(v, device) for v in value)
    return value
