"""Figure 11: what one iteration costs, by number of tasks, as multiples of joint training in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import cross_entropy

from reconmtl.errors import ReconError, RunError
from reconmtl.files import read_json, write_json
from reconmtl.formats import grid
from reconmtl.networks import resnet
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.probing import Probe
from reconmtl.runs import environment

FORMAT = "reconmtl.iterations/1"
TASKS = (2, 5, 10, 20, 40)


def step_of(model: torch.nn.Module, x: torch.Tensor, method: str) -> Callable[[], None]:
    """One iteration without the optimizer: forward, and gradients as a method forms them.

    Raises:
        ReconError: If there is no such method.
    """
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def losses() -> dict[str, torch.Tensor]:
        return {t: cross_entropy(out, target) for t, out in model(x).items()}

    if method == "joint":

        def joint() -> None:
            total = torch.stack(list(losses().values())).sum()
            torch.autograd.backward(total)

        return joint
    if method == "probe":
        probe = Probe(model)
        return lambda: probe.backward(losses())
    raise RunError(f"{method}: iterations of balancers are not timed yet.")


def measure(
    out: Path,
    *,
    tasks: Sequence[int] = TASKS,
    methods: Sequence[str] = ("joint", "probe"),
    width: int = 16,
    batch: int = 16,
    rounds: int = 7,
    device: str = "cpu",
) -> Path:
    """Time iterations of each method in turns, and write the ratios.

    Args:
        out: Folder for `iterations.json`.
        tasks: Numbers of tasks.
        methods: "joint" first: the others are multiples of it.
        width: Of the network for CelebA.
        batch: Images per step.
        rounds: Timed iterations of each; the median counts.
        device: Where it runs.

    Returns:
        The file.
    """
    found = []
    for number in tasks:
        model = resnet.celeba(width=width, tasks=CELEBA_ATTRIBUTES[:number]).to(device)
        x = torch.rand(batch, 3, 64, 64, device=device)
        steps = {}
        for method in methods:
            try:
                steps[method] = step_of(model, x, method)
            except ReconError as error:
                print(error)
        seconds: dict[str, list[float]] = {m: [] for m in steps}
        for i in range(rounds + 1):  # in turns: what slows the machine slows all of them; the first one warms up
            for method, step in steps.items():
                model.zero_grad(set_to_none=True)
                start = time.process_time() if device == "cpu" else time.perf_counter()
                step()
                if device != "cpu":
                    torch.cuda.synchronize()
                end = time.process_time() if device == "cpu" else time.perf_counter()
                if i:
                    seconds[method].append(end - start)
        base = median(seconds["joint"])
        found.append({"tasks": number, **{m: median(s) / base for m, s in seconds.items()}, "joint_seconds": base})
    content = {"format": FORMAT, "width": width, "batch": batch, "rounds": rounds, "device": device, "ratios": found}
    path = out / "iterations.json"
    write_json(path, {**content, "environment": environment()})
    return path


def show(path: Path) -> str:
    """Markdown: a row per number of tasks."""
    if not path.exists():
        return "Nothing is finished yet."
    data = read_json(path, RunError)
    methods = [n for n in data["ratios"][0] if n not in ("tasks", "joint_seconds")]
    cells = [
        [str(r["tasks"]), *(f"{r[m]:.2f}" for m in methods), f"{1000 * r['joint_seconds']:.0f}"] for r in data["ratios"]
    ]
    where = f"{data['device']}, width {data['width']}, batch {data['batch']}, median of {data['rounds']}"
    table = grid(["tasks", *methods, "joint (ms)"], cells)
    return f"{table}\n\nMultiples of joint training's time ({where}); the paper prints a plot without numbers."
