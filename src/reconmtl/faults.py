"""Every fault of a problem at once, found on one batch before anything is trained; and the table of its layers."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import ALL, Data, Targets, call, fetch, leaves, move, select, sets_of
from reconmtl.checking import LOOKED
from reconmtl.errors import ProbeError, ReconError, SplitError, nearest
from reconmtl.evaluation import evaluating, judge
from reconmtl.findings import Checked, CheckedLayer, Finding, number_of
from reconmtl.graph import Graph, many
from reconmtl.layers import Layer, find_layers
from reconmtl.plan import Plan
from reconmtl.problem import Problem, Task, keeping_faults
from reconmtl.randomness import seeded
from reconmtl.splitting import check_optimizer, split
from reconmtl.splitting.refusals import check_layers

BATCH = 32
"""Samples of the batch, at most, unless more are needed to meet every task."""
ENOUGH = 2
"""Samples with a task's target that the batch holds, where they exist: batch statistics need two."""

FAILED: Any = object()


def check(problem: Problem | Callable[[], Problem]) -> Checked:
    """Run one batch with targets of every task through a fresh network and report every fault at once.

    Nothing is trained and nothing of the user's is changed; global random states come back.

    Args:
        problem: The problem; or a function that builds it, of which faults of the definition are reported together
            with those of the data, the network, the losses and the metrics.

    Returns:
        Everything that was found, and the layer table; `print` it.

    Example:
        >>> from reconmtl.problems import planted
        >>> check(planted.make()).ok
        True
    """
    found: list[Finding] = []
    with seeded(0):
        built = problem if isinstance(problem, Problem) else _built(problem, found)
        if built is None:
            return Checked("problem", (), tuple(found))
        batches: dict[tuple[str, str], _Batch | None] = {}
        for what in ("train", "test", "val"):
            data = getattr(built, what)
            for own, part in sets_of(data).items() if data is not None else ():
                batches[what, own] = _batch(built, what, own, part, found)
        layers = _look(built, batches, found)
        for task in built.tasks:
            if not task.metrics:
                text = "it has no metric: its quality stands in no table, and delta-m leaves it out"
                found.append(Finding(f"task {task.name!r}", text, "warning"))
    order = sorted(dict.fromkeys(found), key=lambda f: f.severity)  # "fault" comes before "warning"
    targets: dict[str, dict[str, int]] = {}
    samples: dict[str, int] = {}
    for (what, _), batch in batches.items():
        if batch is not None:
            targets.setdefault(what, {}).update(batch.counts())
            samples[what] = max(samples.get(what, 0), batch.size)
    return Checked(
        problem=built.name,
        tasks=built.task_names,
        findings=tuple(order),
        targets=targets,
        samples=samples,
        layers=layers,
    )


@dataclass(frozen=True)
class _Batch:
    inputs: Any
    targets: Targets
    size: int

    def counts(self) -> dict[str, int]:
        return {t: self.size if at is None else len(at) for t, (_, at) in self.targets.items()}


def _tried(found: list[Finding], about: str, what: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401 of the user
    """Call code of the user's; what it raises (then FAILED is returned), and what it warns of, becomes a finding."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            result = function()
        except ReconError as error:
            found.append(Finding(about, str(error)))
            return FAILED
        except Exception as error:  # whatever a user's code raises
            found.append(Finding(about, f"{what} raised {type(error).__name__}: {error}{_place(error)}"))
            return FAILED
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            text = " ".join(str(warning.message).split())
            found.append(Finding(about, f"{what} warned: {text}", "warning"))
    return result


def _place(error: Exception) -> str:
    """Where in the user's files an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    own = [f for f in frames if not f.filename.startswith((*installed, "<"))]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _built(make: Callable[[], Problem], found: list[Finding]) -> Problem | None:
    with keeping_faults() as kept:
        before = len(found)
        built = _tried(found, "problem", "building it", make)
    if kept:
        del found[before:]
        found += [Finding("problem", text) for text in kept]
    if built is not FAILED and not isinstance(built, Problem):
        found.append(Finding("problem", f"the function returned {type(built).__name__}, not a reconmtl.Problem"))
    return built if isinstance(built, Problem) else None


# Data -----------------------------------------------------------------------------------------------------------------


def _batch(problem: Problem, what: str, own: str, data: Data, found: list[Finding]) -> _Batch | None:
    """A batch in which every task has targets, as far as there are any."""
    names = problem.task_names if own == ALL else (own,)
    if own != ALL:
        what = f"{what}[{own!r}]"

    def get(positions: Sequence[int]) -> tuple[Any, Targets]:
        return fetch(data, torch.tensor(positions), None, problem.collate, own=own or None)

    order = torch.randperm(len(data)).tolist()
    chosen = order[: min(BATCH, max(problem.recipe.batch_size, ENOUGH), len(order))]
    first = _tried(found, what, "fetching a batch", lambda: get(chosen))
    if first is FAILED:
        return None
    counts = _Batch(first[0], first[1], len(chosen)).counts()
    missing = {t: counts.get(t, 0) for t in names if counts.get(t, 0) < ENOUGH}
    for i in order[len(chosen) : LOOKED]:
        if not missing:
            break
        one = _tried(found, what, f"fetching sample {i}", lambda at=i: get([at]))  # type: ignore[misc]
        if one is FAILED:
            return None
        new = [t for t in one[1] if t in missing]
        for t in new:
            missing[t] += 1
            if missing[t] >= ENOUGH:
                del missing[t]
        chosen += [i] if new else []
    batch = _tried(found, what, "fetching a batch", lambda: get(chosen))
    if batch is FAILED:
        return None
    inputs, targets = batch
    there = f"of the {len(order)} samples" if len(order) <= LOOKED else f"of {LOOKED} samples drawn at random"
    absent = [t for t in names if t not in targets]
    extra = [t for t in targets if t not in names]
    for t in absent:
        hint = f" {nearest(t, extra)}" if extra else ""
        if what.startswith("train") or problem.task(t).metrics:
            found.append(Finding(f"task {t!r}", f"no target in {what}: none {there} has one.{hint}"))
    for t in extra:
        text = f"the targets {t!r} belong to no task. {nearest(str(t), absent or names)}"
        found.append(Finding(what, text, "warning"))
    bad = [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor) and not bool(leaf.isfinite().all())]
    if bad:
        found.append(Finding(what, f"the inputs hold values that are not finite (shape {list(bad[0].shape)})"))
    return _Batch(inputs, {t: targets[t] for t in names if t in targets}, len(chosen))


# Network, losses, metrics ---------------------------------------------------------------------------------------------


def _look(
    problem: Problem, batches: Mapping[tuple[str, str], _Batch | None], found: list[Finding]
) -> tuple[CheckedLayer, ...]:
    model = _tried(found, "model", "building it", problem.model)
    if model is FAILED:
        return ()
    if not isinstance(model, nn.Module):
        found.append(Finding("model", f"the function returned {type(model).__name__}, not a torch.nn.Module"))
        return ()
    again = _tried(found, "model", "building it a second time", problem.model)
    if again is model:
        text = "the function returns the same network each time; every training has to start from a fresh one"
        found.append(Finding("model", text))
    model.train()
    _tried(found, "recipe", "building the optimizer", lambda: _optimizer(problem, model))
    layers: tuple[CheckedLayer, ...] = ()
    train = {own: b for (what, own), b in batches.items() if what == "train" and b is not None}
    if train:
        layers = _backward(problem, model, train, found)
    for (what, own), batch in batches.items():
        if batch is not None and what != "train":
            _judge(problem, model, what, own, batch, found)
    if problem.single is not None:
        _singles(problem, train, found)
    return layers


def _optimizer(problem: Problem, model: nn.Module) -> None:
    check_optimizer(model, problem.recipe.make_optimizer(model))


def _outputs(
    problem: Problem, model: nn.Module, own: str, batch: _Batch, what: str, found: list[Finding]
) -> Mapping[str, Any] | None:
    outputs = _tried(found, "model", f"running it on a batch of {what}", lambda: call(model, batch.inputs))
    if outputs is FAILED:
        return None
    if not isinstance(outputs, Mapping):
        found.append(Finding("model", f"it should return {{task: output}}, returned {type(outputs).__name__}"))
        return None
    absent = [t for t in (problem.task_names if own == ALL else (own,)) if t not in outputs]
    extra = [str(t) for t in outputs if t not in problem.task_names]
    found += [Finding(f"task {t!r}", f"the model returns no output for it. {nearest(t, extra)}") for t in absent]
    for t in extra:
        text = f"the output {t!r} belongs to no task. {nearest(t, absent or problem.task_names)}"
        found.append(Finding("model", text, "warning"))
    return outputs


def _loss(task: Task, outputs: Mapping[str, Any], batch: _Batch, found: list[Finding]) -> Tensor | None:
    about = f"task {task.name!r}"
    values, at = batch.targets[task.name]
    n = batch.counts()[task.name]
    output = _tried(found, about, "taking the rows that have a target", lambda: select(outputs[task.name], at))
    loss = FAILED if output is FAILED else _tried(found, about, "the loss", lambda: task.loss(output, values))
    if loss is FAILED:
        return None
    shapes = f"output {_shape(output)}, target {_shape(values)}"
    if not isinstance(loss, Tensor):
        found.append(Finding(about, f"the loss should be a scalar tensor, found {type(loss).__name__}"))
    elif loss.ndim:
        text = f"the loss should be a scalar, the mean over samples, found shape {list(loss.shape)} ({shapes})"
        found.append(Finding(about, text))
    elif not bool(loss.isfinite()):
        hint = ""
        if any(isinstance(v, Tensor) and not bool(v.isfinite().all()) for v in leaves(values)):
            hint = " Its targets are not finite: a missing target is an absent key or None."
        found.append(Finding(about, f"the loss of the first batch is {loss.item()} ({shapes}).{hint}"))
    elif loss.grad_fn is None:
        found.append(Finding(about, f"the loss depends on no parameter of the network ({shapes}): no gradient"))
    else:
        if isinstance(output, Tensor) and (output.ndim == 0 or len(output) != n):
            text = f"the output has shape {list(output.shape)}, but there are {n} samples: is it one row per sample?"
            found.append(Finding(about, text, "warning"))
        return loss
    return None


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _backward(
    problem: Problem, model: nn.Module, batches: Mapping[str, _Batch], found: list[Finding]
) -> tuple[CheckedLayer, ...]:
    calls: list[tuple[str, Any]] = []
    losses = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:

                def note(_module: nn.Module, _inputs: Any, out: Any, name: str = name) -> None:  # noqa: ANN401
                    calls.append((name, getattr(out, "grad_fn", None)))

                hooks.callback(module.register_forward_hook(note).remove)
        for own, batch in batches.items():
            outputs = _outputs(problem, model, own, batch, "train", found)
            for task in problem.tasks:
                if outputs is not None and task.name in batch.targets and task.name in outputs:
                    loss = _loss(task, outputs, batch, found)
                    if loss is not None:
                        losses[task.name] = loss
    losses = {t: losses[t] for t in problem.task_names if t in losses}
    masks = dict.fromkeys((n for n, _ in model.named_parameters()), 0)
    if losses:
        try:
            graph = Graph(list(losses.values()), opaque=problem.shared is not None)
        except ProbeError as error:
            found.append(Finding("model", str(error)))
            graph = Graph(list(losses.values()), opaque=True)
        masks = {n: graph.mask(p) for n, p in model.named_parameters()}
        _mixed_statistics(calls, graph, tuple(losses), found)
    _gradients(model, losses, found)
    if len(losses) == len(problem.tasks):
        trained = [n for n, p in model.named_parameters() if p.requires_grad and not masks[n]]
        if trained:
            shown = ", ".join(trained[:5]) + (", ..." if len(trained) > 5 else "")
            text = (
                f"{number_of(len(trained), 'parameter')} reached by no task's loss: {shown}. They will never be trained"
            )
            found.append(Finding("model", text, "warning"))
        if len(losses) > 1 and not any(map(many, masks.values())):
            found.append(Finding("model", "no parameter is reached by the losses of two tasks: nothing is shared"))
    return _layers(problem, model, tuple(losses), masks)


def _mixed_statistics(
    calls: Sequence[tuple[str, Any]], graph: Graph, tasks: tuple[str, ...], found: list[Finding]
) -> None:
    """A BatchNorm that is called on several tasks' values keeps one set of running statistics of all of them."""
    by_name: dict[str, set[int]] = {}
    for name, node in calls:
        mask = graph.masks.get(node, 0) if node is not None else 0
        if mask:
            by_name.setdefault(name, set()).add(mask)
    for name, masks in by_name.items():
        if len(masks) > 1:
            of = sorted({"+".join(t for i, t in enumerate(tasks) if m >> i & 1) for m in masks})
            text = (
                f"the BatchNorm {name!r} is called on values of different tasks ({'; '.join(of)}) in one forward pass: "
                "its running statistics mix them. Give each task one of its own, or compare with split networks only "
                "under norm_stats='shared'"
            )
            found.append(Finding("model", text, "warning"))


def _gradients(model: nn.Module, losses: Mapping[str, Tensor], found: list[Finding]) -> None:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for task, loss in losses.items():
        about = f"task {task!r}"

        def take(loss: Tensor = loss) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)

        grads = _tried(found, about, "the backward pass", take)
        if grads is FAILED:
            continue
        there = {n: g for n, g in zip(trained, grads, strict=True) if g is not None}
        wrong = [n for n, g in there.items() if not bool(g.isfinite().all())]
        if not there:
            found.append(Finding(about, "the loss reaches no trainable parameter: no gradient"))
        elif wrong:
            found.append(Finding(about, f"the gradient at {wrong[0]!r} is not finite ({len(wrong)} in all)"))
        elif not any(bool(g.count_nonzero()) for g in there.values()):
            found.append(Finding(about, "the gradient is zero at every parameter", "warning"))


def _judge(problem: Problem, model: nn.Module, what: str, own: str, batch: _Batch, found: list[Finding]) -> None:
    with evaluating(model), torch.no_grad():
        outputs = _outputs(problem, model, own, batch, what, found)
        for task in problem.tasks:
            if outputs is None or task.name not in batch.targets or task.name not in outputs:
                continue
            values, at = batch.targets[task.name]
            about = f"task {task.name!r}"
            output = _tried(found, about, "taking the rows that have a target", lambda: select(outputs[task.name], at))  # noqa: B023 called at once
            if output is FAILED:
                continue
            for metric in task.metrics:
                n = batch.counts()[task.name]
                value = _tried(
                    found,
                    about,
                    f"metric {metric.name!r}",
                    lambda: judge(metric, task.name, output, values, n),  # noqa: B023 called at once
                )
                if value is not FAILED and not math.isfinite(value):
                    seen = f"{number_of(n, 'sample')} of {what}"
                    text = f"metric {metric.name!r} is {value} on {seen}: no number that could be compared"
                    found.append(Finding(about, text, "warning"))


def _singles(problem: Problem, batches: Mapping[str, _Batch], found: list[Finding]) -> None:
    assert problem.single is not None
    for task in problem.task_names:
        batch = batches.get(task) or batches.get(ALL)
        if batch is None:
            continue
        about = f"single-task network of {task!r}"
        network = _tried(found, about, "building it", lambda t=task: problem.single(t))  # type: ignore[misc]
        if network is FAILED:
            continue
        if not isinstance(network, nn.Module):
            found.append(Finding(about, f"the function returned {type(network).__name__}, not a torch.nn.Module"))
            continue
        outputs = _tried(found, about, "running it", lambda n=network, b=batch: call(n, b.inputs))  # type: ignore[misc]
        if outputs is not FAILED and (not isinstance(outputs, Mapping) or task not in outputs):
            found.append(Finding(about, f"it should return {{{task!r}: output}}"))


# Layers ---------------------------------------------------------------------------------------------------------------


def _layers(
    problem: Problem, model: nn.Module, tasks: tuple[str, ...], masks: Mapping[str, int]
) -> tuple[CheckedLayer, ...]:
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    reached: dict[str, tuple[str, ...]] = {}
    why: dict[str, str] = {}
    layers = find_layers(model)
    for layer in layers:
        mask = 0
        for name in layer.parameters:
            mask |= masks[name]
        reached[layer.name] = tuple(t for i, t in enumerate(tasks) if mask >> i & 1)
        if not trained & set(layer.parameters):
            why[layer.name] = "frozen"
        elif len(reached[layer.name]) < 2:
            why[layer.name] = (
                f"only {reached[layer.name][0]} reaches it" if reached[layer.name] else "no task reaches it"
            )
    candidates = [layer for layer in layers if layer.name not in why]
    if len(problem.tasks) > 1:
        sample = move(problem.sample(), torch.device("cpu"))
        with evaluating(model):  # restores the modes; a split copies the model
            why |= _refusals(model, problem.task_names, candidates, sample)
    return tuple(
        CheckedLayer(e.name, e.type, e.numel, reached[e.name], e.name not in why, why.get(e.name, "")) for e in layers
    )


def _refusals(model: nn.Module, tasks: tuple[str, ...], layers: Sequence[Layer], sample: object) -> dict[str, str]:
    """Why layers cannot be split; all of them are tried together first, and halves only where that fails."""
    why: dict[str, str] = {}
    each = tuple((t,) for t in tasks)
    for layer in layers:
        try:
            check_layers(model, {layer.name: each})
        except SplitError as error:
            why[layer.name] = str(error).removeprefix("Cannot split: ")

    def attempt(names: list[str]) -> None:
        try:
            split(model, Plan(tasks=tasks, layers=names), sample=sample)
        except ReconError as error:
            if len(names) == 1:
                why[names[0]] = str(error)
                return
            attempt(names[: len(names) // 2])
            attempt(names[len(names) // 2 :])

    rest = [layer.name for layer in layers if layer.name not in why]
    if rest:
        attempt(rest)
    return why
