"""What the user brings: a network, tasks with losses and metrics, data, and how to train."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from reconmtl.batches import ALL, Data, Movable, Sets, Targets, check_outputs, fetch, length, move, select, sets_of
from reconmtl.batches import call as call
from reconmtl.errors import PlanError, ProblemError, UnknownNameError, nearest
from reconmtl.fingerprints import mark_of
from reconmtl.plan import check_tasks

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


_kept: ContextVar[list[str] | None] = ContextVar("faults", default=None)


@contextmanager
def keeping_faults() -> Iterator[list[str]]:
    """Build problems in spite of their faults, where anything can still be run; yields the faults."""
    kept: list[str] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


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
    best: Literal["max", "min"] = field(kw_only=True, default=cast("Any", None))  # so that the problem can name it

    @property
    def arrow(self) -> str:
        """The direction as the field's tables print it."""
        return "↑" if self.best == "max" else "↓"

    @property
    def is_factory(self) -> bool:
        """Whether `fn` makes a stateful metric instead of returning values per sample."""
        return _takes(self.fn, 0)


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
            if not _is_count(value):
                faults.append(f"{name} = {value!r}: expected a whole number of at least 1")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                faults.append(f"{name} = {value!r}: expected a number that is not negative")
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            faults.append(f"optimizer = {self.optimizer!r}: unknown. {nearest(self.optimizer, OPTIMIZERS).rstrip('.')}")
        elif not isinstance(self.optimizer, str) and not callable(self.optimizer):
            faults.append(f"optimizer = {self.optimizer!r}: expected {', '.join(map(repr, OPTIMIZERS))} or a function")
        elif self.momentum and self.optimizer != "sgd":
            faults.append(f"momentum = {self.momentum!r} belongs to 'sgd', not to {self.optimizer!r}")
        if self.weight_decay and callable(self.optimizer):
            faults.append(f"weight_decay = {self.weight_decay!r}: your own optimizer function has to set it")
        if self.param_groups is not None and not callable(self.param_groups):
            faults.append("param_groups: expected a function (model) -> groups; every training builds a fresh model")
        milestones = self.milestones
        if not isinstance(milestones, (tuple, list)) or not all(_is_count(m) for m in milestones):
            faults.append(f"milestones = {milestones!r}: expected a tuple of epochs, whole numbers of at least 1")
        elif list(milestones) != sorted(set(milestones)):
            faults.append(f"milestones = {milestones!r}: expected rising epochs")
        if faults:
            raise ProblemError("This recipe cannot be trained: " + "; ".join(faults) + ".")
        object.__setattr__(self, "milestones", tuple(milestones))  # a list comes from a file

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
        train: Training set; items are (input, {task: target}). Or {task: data set}, where tasks have their own inputs:
            a step then draws a batch per task, an epoch is the longest set, and items may be (input, target).
        test: Test set, likewise.
        recipe: How to train.
        val: Validation set; evaluated beside the test set, never used to choose anything.
        single: A function (task name) -> network for single-task training; None uses the joint network.
        collate: A function (list of items) -> (inputs, {task: targets of all items}); a task that is absent or None is
            left out of the batch. None stacks inputs, and of each task the targets that are there.
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
        train: Sets,
        test: Sets,
        recipe: Recipe,
        val: Sets | None = None,
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
        faults += _task_faults(tasks)
        sets = {"train": train, "test": test} | ({} if val is None else {"val": val})
        for what, data in sets.items():
            faults += _data_faults(what, data) if not isinstance(data, Mapping) else _own_faults(what, data, tasks)
        for what, function in (("single", single), ("collate", collate)):
            if function is not None and (isinstance(function, nn.Module) or not callable(function)):
                faults.append(f"{what}: expected a function or None, got {type(function).__name__}")
        if not isinstance(recipe, Recipe):
            faults.append(f"recipe: expected a Recipe, got {type(recipe).__name__}")
        elif recipe.drop_last and 0 < (longest := _longest(train)) < recipe.batch_size:
            faults.append(
                f"train: {longest} samples are fewer than one batch of {recipe.batch_size}, and drop_last leaves "
                "such a batch out; lower batch_size or pass drop_last=False"
            )
        if faults:
            kept = _kept.get()
            if kept is not None:
                kept += [f for f in faults if f not in kept]
            if kept is None or not _runnable(model, tasks, sets.values(), recipe):
                raise ProblemError("This problem cannot be trained:\n- " + "\n- ".join(faults))
        self.model = model
        self.tasks = tuple(tasks)
        self.train: Any = train  # a data set, or {task: data set}; `sets_of` makes both alike
        self.test: Any = test
        self.recipe = recipe
        self.val: Any = val
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
        sets = {n: getattr(self, n) for n in ("train", "test", "val")}
        own = {n: {t: data[t] for t in tasks} for n, data in sets.items() if isinstance(data, Mapping)}
        return self.replace(tasks=[self.task(t) for t in tasks], **own)

    def replace(self, **changes: Any) -> Problem:  # noqa: ANN401 any argument
        """The same problem with some arguments changed."""
        names = ("model", "tasks", "train", "test", "recipe", "val", "single", "collate", "shared", "name")
        return Problem(**{**{n: getattr(self, n) for n in names}, **changes})

    def fingerprint(self) -> str:
        """A short name of the data and its split: runs with different ones cannot be compared.

        Made of the problem's name, and of training and test set the length and the attribute `fingerprint` if that is a
        string, else the first, middle and last item.
        """
        parts = [self.name]
        for sets in (self.train, self.test):
            for task, data in sets_of(sets).items():
                parts += [task] * (task != ALL) + [mark_of(data), str(len(data))]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]

    def batch(self, data: Data, indices: Tensor, device: torch.device, *, own: str = ALL) -> tuple[Any, Targets]:
        """Fetch a batch.

        Args:
            data: One of the problem's data sets.
            indices: Positions of the samples, [n].
            device: Where the tensors go.
            own: The task that the data set belongs to; `ALL` if it is shared.

        Returns:
            The inputs, and per task that any sample has a target for: the targets and their positions in the batch.

        Raises:
            ProblemError: If the items are not `(input, {task: target})`.
        """
        if isinstance(data, Mapping):
            raise ProblemError("Tasks with data of their own have no common batch; this works on shared data only.")
        if self.collate is None and isinstance(data, Movable):
            data = data.on(device)
        if own == ALL:
            inputs, targets = fetch(data, indices, self.task_names, self.collate)
        else:
            inputs, targets = fetch(data, indices, [own], self.collate, own=own)
        return move(inputs, device), {
            t: (move(values, device), move(at, device)) for t, (values, at) in targets.items()
        }

    def sample(self) -> Any:  # noqa: ANN401 whatever the model takes
        """Inputs of two samples, as batch statistics need: from them a split learns who owns what."""
        own, data = next(iter(sets_of(self.train).items()))
        return self.batch(data, torch.arange(min(2, len(data))), torch.device("cpu"), own=own)[0]

    def losses(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Weighted loss of each task that the batch has targets for.

        Raises:
            ProblemError: If the model's output has no entry for a task, or a loss is no scalar.
        """
        check_outputs(outputs, targets)
        losses = {}
        for task in self.tasks:
            if task.name in targets:
                values, at = targets[task.name]
                loss = task.loss(select(outputs[task.name], at), values)
                if not isinstance(loss, Tensor) or loss.ndim != 0:
                    found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise ProblemError(
                        f"The loss of task {task.name!r} should be a scalar tensor, the mean over the samples; found "
                        f"{found}."
                    )
                losses[task.name] = loss * task.weight
        return losses

    def differences(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Weighted loss of each task on one half of the batch less that on the other.

        Its gradient is nothing but noise of the batch. A task with fewer than two samples is left out; the last one of
        an odd number is.

        Raises:
            ProblemError: If the samples of an output or a target cannot be told apart.
        """
        found = {}
        for task in self.tasks:
            values, at = targets.get(task.name, (None, None))
            n = length(values) // 2
            if n == 0:
                continue
            output, device = outputs[task.name], None if at is None else at.device
            halves = torch.arange(2 * n, device=device).view(2, n)
            first, second = (task.loss(select(output, h if at is None else at[h]), select(values, h)) for h in halves)
            found[task.name] = (first - second) * task.weight
        return found


def _runnable(model: object, tasks: object, sets: Iterable[Any], recipe: object) -> bool:
    """Whether a problem with faults still tells enough to look for more of them."""
    fine = isinstance(tasks, (list, tuple)) and all(isinstance(t, Task) and _takes(t.loss, 2) for t in tasks)
    return fine and callable(model) and isinstance(recipe, Recipe) and all(map(_longest, sets))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _data_faults(what: str, data: Any) -> list[str]:  # noqa: ANN401 whatever was given
    mapped = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not mapped or isinstance(data, (Mapping, str, IterableDataset)):
        return [f"{what}: expected a map-style data set with len() and [], got {type(data).__name__}"]
    return [] if len(data) else [f"{what}: the data set is empty"]


def _own_faults(what: str, data: Mapping[Any, Any], tasks: Any) -> list[str]:  # noqa: ANN401 whatever was given
    names = [t.name for t in tasks if isinstance(t, Task)] if isinstance(tasks, (list, tuple)) else []
    faults = [f"{what}: task {t!r} has no data set of its own" for t in names if t not in data]
    faults += [
        f"{what}: a data set belongs to no task, {t!r}. {nearest(str(t), names)}" for t in data if t not in names
    ]
    return faults + [f for t, own in data.items() for f in _data_faults(f"{what}[{t!r}]", own)]


def _longest(data: Any) -> int:  # noqa: ANN401 whatever was given
    """Samples of the longest set; 0 if one of them cannot be used."""
    sets = list(data.values()) if isinstance(data, Mapping) else [data]
    return 0 if any(_data_faults("", d) for d in sets) else max(map(len, sets), default=0)


def _task_faults(tasks: Any) -> list[str]:  # noqa: ANN401 whatever was given
    if not isinstance(tasks, (list, tuple)) or not all(isinstance(t, Task) for t in tasks):
        return ["tasks: expected a list of Task(name, loss=...)"]
    faults = []
    try:
        check_tasks(t.name for t in tasks)
    except PlanError as error:
        faults.append(f"tasks: {error}")
    for task in tasks:
        here = f"task {task.name!r}"
        if isinstance(task.loss, type) or not _takes(task.loss, 2):
            faults.append(f"{here}: loss should be a function (output, target) -> scalar, found {task.loss!r}")
        if not _is_number(task.weight) or task.weight <= 0:
            faults.append(f"{here}: weight = {task.weight!r}, expected a positive number")
        if not isinstance(task.metrics, (list, tuple)) or not all(isinstance(m, Metric) for m in task.metrics):
            faults.append(f"{here}: metrics should be a list of Metric(name, fn, best=...)")
            continue
        names = [m.name for m in task.metrics]
        faults += [f"{here}: two metrics are called {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
        faults += [
            f"{here}: the metric's name should be a string, found {n!r}" for n in names if not isinstance(n, str)
        ]
        for metric in task.metrics:
            if metric.best not in ("max", "min"):
                given = "no direction (best=)" if metric.best is None else f"best = {metric.best!r}"
                faults.append(f"{here}, metric {metric.name!r}: {given}, expected 'max' or 'min'")
            stateful = isinstance(metric.fn, type) or hasattr(metric.fn, "compute")
            if not _takes(metric.fn, 0) and (stateful or not _takes(metric.fn, 2)):
                faults.append(
                    f"{here}, metric {metric.name!r}: fn should be a function (output, target) -> values [N], or a "
                    f"function without arguments that makes a stateful metric (lambda: ...), found {metric.fn!r}"
                )
    return faults


def _takes(function: object, n: int) -> bool:
    """Whether `function` can be called with n arguments, and is not merely one that swallows any number."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
        signature.bind(*range(n))
    except ValueError:  # builtins without a signature take (output, target)
        return n > 0
    except TypeError:
        return False
    return n > 0 or not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
