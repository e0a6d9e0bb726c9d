"""Figure 11: what one iteration costs, by number of tasks, as multiples of joint training in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from reconmtl.comparing import Spread
from reconmtl.errors import RunError
from reconmtl.files import read_json, write_json
from reconmtl.formats import grid
from reconmtl.loop import NEVER
from reconmtl.networks import resnet
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.paper import drawings
from reconmtl.probing import Probe
from reconmtl.runs import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "reconmtl.iterations/1"
TASKS = (2, 5, 10, 20, 40)


METHODS = ("joint", "probe", "cagrad:c=0.1", "graddrop", "pcgrad", "mgda")
"""Joint training, joint training whose conflicts are recorded, and the paper's balancers."""


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
    balanced = Probe(model, balancer=method, start=NEVER)  # as in a training that records nothing
    return lambda: balanced.backward(losses())


def measure(
    out: Path,
    *,
    tasks: Sequence[int] = TASKS,
    methods: Sequence[str] = METHODS,
    width: int = 16,
    batch: int = 16,
    rounds: int = 7,
    device: str = "cpu",
) -> Path:
    """Time iterations of each method in turns, and write the ratios.

    Args:
        out: Folder for the file, see `file_of`.
        tasks: Numbers of tasks.
        methods: "joint" first: the others are multiples of it; balancers as `fit` names them.
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
        steps = {method: step_of(model, x, method) for method in methods}
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
    path = file_of(out, device)
    write_json(path, {**content, "environment": environment()})
    return path


def file_of(folder: Path, device: str) -> Path:
    """Where the ratios on a device are: `iterations.json`, and `iterations-cuda.json` say."""
    return folder / ("iterations.json" if device == "cpu" else f"iterations-{device}.json")


def files_in(folder: Path) -> list[Path]:
    """What has been measured, the CPU first."""
    return sorted(folder.glob("iterations*.json"), key=lambda path: (len(path.name), path.name))


def draw(folder: Path) -> Figure | None:
    """A line per method over the number of tasks, a panel per device."""
    panels = []
    for path in files_in(folder):
        data = read_json(path, RunError)
        of = {m: [drawings.Point(r["tasks"], Spread.of([r[m]])) for r in data["ratios"]] for m in _methods(data)}
        panels.append(drawings.Panel(f"tasks ({data['device']})", of, log=True))
    return drawings.lines(panels, "cost of an iteration / joint training's") if panels else None


def _methods(data: Any) -> list[str]:  # noqa: ANN401 from a file
    return [n for n in data["ratios"][0] if n not in ("tasks", "joint_seconds")]


def show(folder: Path) -> str:
    """Markdown: a row per number of tasks, a table per device."""
    return "\n\n".join(map(_show, files_in(folder))) or "Nothing is finished yet."


def _show(path: Path) -> str:
    data = read_json(path, RunError)
    methods = _methods(data)
    cells = [
        [str(r["tasks"]), *(f"{r[m]:.2f}" for m in methods), f"{1000 * r['joint_seconds']:.0f}"] for r in data["ratios"]
    ]
    where = f"{data['device']}, ResNet18 of width {data['width']}, batch {data['batch']}, median of {data['rounds']}"
    table = grid(["tasks", *methods, "joint (ms)"], cells)
    kind = "processor time" if data["device"] == "cpu" else "time"
    return f"{table}\n\nMultiples of joint training's {kind} ({where}); the paper prints a plot without numbers."
