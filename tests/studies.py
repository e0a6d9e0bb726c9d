"""Studies on disk with known content, without training: as many tasks, layers and steps as a test wants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reconmtl.conflicts import ConflictLog
from reconmtl.plan import Plan
from reconmtl.reporting.material import Material
from reconmtl.runs import Run


def grams(*, steps: int, layers: int, tasks: int, seed: int = 0, pull: float = 1.0) -> Tensor:
    """Packed Gram matrices [steps, layers, tasks * (tasks + 1) / 2] of tasks in three camps.

    The camps oppose one another, most in early steps and at every third layer; `pull` scales how much.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 24
    camps = torch.randn(3, size, generator=generator)
    camps = camps - camps.mean(0)
    camp = torch.arange(tasks) % 3
    rows, columns = torch.triu_indices(tasks, tasks)
    own = torch.rand(layers, generator=generator)
    heat = torch.tensor([1.0 if k % 3 == 1 else 0.5 - 0.3 * k / layers for k in range(layers)]) * (0.55 + 0.45 * own)
    out = []
    for step in range(steps):
        strength = pull * heat * (1.2 - 0.8 * step / steps)
        noise = torch.randn(layers, tasks, size, generator=generator)
        gradients = noise + 0.25 * torch.randn(layers, 1, size, generator=generator)
        gradients = gradients + 0.9 * strength[:, None, None] * camps[camp]
        out.append((gradients @ gradients.transpose(1, 2))[:, rows, columns])
    return torch.stack(out)


def conflict_log(
    *, tasks: Sequence[str], layers: Sequence[str], steps: int, seed: int = 0, pull: float = 1.0, every: int = 1
) -> ConflictLog:
    """A log of such Gram matrices."""
    kinds = ("Conv2d", "BatchNorm2d")
    return ConflictLog(
        grams(steps=steps, layers=len(layers), tasks=len(tasks), seed=seed, pull=pull),
        tasks=tasks,
        layers=layers,
        sizes={n: 64 if i % 2 else 1000 * (i + 1) for i, n in enumerate(layers)},
        types={n: kinds[i % 2] for i, n in enumerate(layers)},
        every=every,
    )


def network_names(layers: int) -> list[str]:
    """Names as a residual network has them."""
    return [f"backbone.layer{1 + i // 10}.{i % 10 // 2}.{'bn' if i % 2 else 'conv'}{1 + i % 2}" for i in range(layers)]


def write_study(
    folder: Path,
    *,
    tasks: Sequence[str],
    layers: Sequence[str],
    steps: int = 64,
    seeds: Sequence[int] = (0, 1),
    counted: bool = False,
    groups: bool = False,
) -> Path:
    """A study as `reconmtl run` leaves it: single, joint, recon and random under some seeds, log and plan."""
    log = conflict_log(tasks=tasks, layers=layers, steps=steps)
    if counted:
        first, *rest = (log.window(k, k + 8) for k in range(0, steps, 8))
        log = first.counted().merge([part.counted() for part in rest])
    log.save(folder / "log")
    k = max(1, len(layers) // 3)
    plan = log.rank(severity=-0.1).top(k)
    if groups and len(tasks) > 2:
        halves = [list(tasks[::2]), list(tasks[1::2])]
        plan = Plan(tasks=tasks, layers=dict.fromkeys(plan.layers, halves), chosen=plan.chosen)
    plan.save(folder / "plan.json")
    methods = {"single": None, "joint": None, "recon": plan, "random": Plan.random_layers(log, k)}
    study: dict[str, object] = {
        "format": "reconmtl.study/1",
        "problem": "made.py:up",
        "options": {},
        "methods": list(methods),
    }
    study |= {"norm_stats": "per-task", "severity": -0.1, "epochs": 6, "preset": None, "seeds": list(seeds)}
    _write(folder / "config.json", study)
    command = ["/bin/reconmtl", "run", "made.py:up", "--epochs", "6", "--out", str(folder)]
    _write(folder / "env.json", {"packages": {"reconmtl": "0.1.0"}, "python": "3.11", "command": command})
    labels = {"single": "single-task", "recon": "joint w/ Recon", "random": f"joint w/ {k} random layers"}
    for place, (method, of) in enumerate(methods.items()):
        for seed in seeds:
            run = folder / method / f"seed{seed}"
            rise = [0.55 + 0.06 * e - 0.004 * e * e + (0.02 if of is plan else 0.0) for e in range(1, 7)]
            metrics = {
                t: {"acc": 100 * (rise[-1] + 0.003 * seed - 0.02 * (place == 1)) - i % 7} for i, t in enumerate(tasks)
            }
            lines = [
                {
                    "epoch": e,
                    "tasks": list(tasks),
                    "loss": 1.0 / e,
                    "test": {t: {"acc": 100 * a - i % 7} for i, t in enumerate(tasks)},
                }
                for e, a in enumerate(rise, start=1)
            ]
            _write(run / "config.json", {"problem": "made.py:up", "recipe": {"epochs": 6}, "norm_stats": "per-task"})
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if of is not None:
                of.save(run / "plan.json")
            if method != "single":
                kept = [n for n in layers if of is None or n not in of.layers]
                pull = 0.6 if of is plan else 1.0
                conflict_log(tasks=tasks, layers=kept, steps=max(8, steps // 4), seed=7 + seed, pull=pull).save(
                    run / "log"
                )
            _write(run / "timing.json", {"format": "reconmtl.timing/1", "seconds": 10.0})
            _write(
                run / "result.json",
                {
                    "format": "reconmtl.run/1",
                    "method": "single" if method == "single" else "joint",
                    "label": labels.get(method, method),
                    "seed": seed,
                    "metrics": metrics,
                    "directions": {t: {"acc": "max"} for t in tasks},
                    "parameters": 100_000 * (len(tasks) if method == "single" else 1) + 10_000 * place,
                    "megabytes": 0.4,
                    "seconds": 10.0,
                    "fingerprint": "f",
                    "network": "Net",
                },
            )
    return folder


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def material(log: ConflictLog | None, plan: Plan | None = None, severity: float = -0.1) -> Material:
    return Material(
        runs=(),
        comparison=None,
        refused="",
        log=log,
        log_source="",
        plan=plan,
        severity=severity,
        curves=(),
        problem="",
        command=None,
    )


def gappy(steps: int = 70, layers: int = 5) -> ConflictLog:
    """A log in which one task never reaches the first layer, and another layer is silent in one step."""
    log = conflict_log(tasks=("a", "b", "c", "d"), layers=network_names(layers), steps=steps)
    grams = log.grams.clone()
    rows, columns = torch.triu_indices(4, 4)
    grams[:, 0, (rows == 1) | (columns == 1)] = torch.nan
    grams[-1, 2] = 0.0
    return ConflictLog(grams, tasks=("a", "b", "c", "d"), layers=log.layers, sizes=log.sizes, types=log.types, every=2)


def accuracies(label: str, values: dict[int, float]) -> list[Run]:
    """Runs of a row, seed -> accuracy of both tasks."""
    return [
        Run(
            method="joint",
            label=label,
            seed=seed,
            metrics={"digit": {"acc": value}, "fashion": {"acc": value}},
            directions={"digit": {"acc": "max"}, "fashion": {"acc": "max"}},
            parameters=1000,
            seconds=1.0,
            fingerprint="f",
            network="Net",
        )
        for seed, value in values.items()
    ]
