"""What torch.compile and bf16 save in one training step of a joint and of a split network; steps per second.

    python benchmarks/compiling.py                 # some 4 minutes on a CPU; writes results/compiling-cpu.json
    python benchmarks/compiling.py --width 64 --batch 256   # the paper's; on a GPU writes compiling-cuda.json
    python benchmarks/compiling.py --table         # prints the files as Markdown and puts them into docs/runs.md

ResNet18 on images of 36 x 36 with two tasks: joint; split in its normalisations and first layer, as Recon's plans are,
so that nothing is left in common; and split in its last block, so that nearly everything is. A step is zero_grad,
forward and backward. All variants of a network take turns in one process, in another order in every round; a ratio is
the median over rounds of a variant's time to that of plain eager steps in the same round.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from reconmtl.compiled import Compiled
from reconmtl.layers import find_layers
from reconmtl.networks import resnet
from reconmtl.plan import Plan
from reconmtl.splitting import split

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "runs.md"
MARKS = "<!-- benchmark:compiling -->", "<!-- /benchmark:compiling -->"
TASKS = ("digit", "fashion")
VARIANTS = ("eager", "compiled", "bf16", "bf16, compiled")


def networks(width: int, device: str) -> dict[str, nn.Module]:
    """The networks by name."""
    torch.manual_seed(0)
    net = resnet.multifashion(width=width, tasks=TASKS)
    names = [layer.name for layer in find_layers(net)]
    early = [n for n in names if "bn" in n or n in ("conv1", "layer1.0.conv1")]
    late = [n for n in names if n.startswith("layer4.1.")]
    sample = torch.rand(2, 1, 36, 36)
    return {
        "joint": net.to(device),
        "split early": split(net, Plan(tasks=TASKS, layers=early), sample=sample).to(device),
        "split late": split(net, Plan(tasks=TASKS, layers=late), sample=sample).to(device),
    }


def steps(model: nn.Module, batch: int, device: str) -> dict[str, Callable[[], None]]:
    """A training step in every variant."""
    x = torch.rand(batch, 1, 36, 36, device=device)
    y = {t: torch.randint(10, (batch,), device=device) for t in TASKS}

    def make(variant: str) -> Callable[[], None]:
        run = Compiled(model, TASKS) if "compiled" in variant else model

        def step() -> None:
            model.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled="bf16" in variant):
                losses = [F.cross_entropy(out, y[t]) for t, out in run(x).items()]
            torch.stack(losses).sum().backward()

        return step

    return {variant: make(variant) for variant in VARIANTS}


def measure(model: nn.Module, batch: int, device: str, rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Variant -> its time relative to eager, steps per second, and seconds of its first step."""
    rows, first = steps(model, batch, device), {}
    for name, step in rows.items():
        torch.compiler.reset()
        first[name] = _timed(step, 1)
        step()
    spent: dict[str, list[float]] = {n: [] for n in rows}
    order = list(rows)
    for k in range(rounds):
        random.Random(k).shuffle(order)
        for name in order:
            spent[name].append(_timed(rows[name], repeats) / repeats)
    return {
        name: {
            "ratio": median(a / b for a, b in zip(of, spent["eager"], strict=True)),
            "per second": 1 / median(of),
            "first": first[name],
        }
        for name, of in spent.items()
    }


def _timed(step: Callable[[], None], repeats: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| network | variant | x eager | steps/s | first step, s |", "|---|---|--:|--:|--:|"]
    for network, rows in found["networks"].items():
        for variant, row in rows.items():
            numbers = f"{row['ratio']:.2f} | {row['per second']:.3g} | {row['first']:.1f}"
            lines.append(f"| {network} | {variant} | {numbers} |")
    return "\n".join([*lines, "", f"`{found['command']}`: {found['about']}"])


def main() -> None:
    """Measure, or print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.table:
        text = "\n\n".join(table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("compiling-*.json")))
        before, _, rest = DOCS.read_text().partition(MARKS[0])
        DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        print(text)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if device == "cuda" else f"one thread of {platform.processor() or 'a CPU'}"
    about = (
        f"width {options.width}, batch {options.batch}, {options.rounds} rounds, {where}, torch {torch.__version__}."
    )
    found = {
        "command": f"python benchmarks/compiling.py --width {options.width} --batch {options.batch}",
        "about": about,
        "networks": {
            name: measure(net.train(), options.batch, device, options.rounds, options.repeats)
            for name, net in networks(options.width, device).items()
        },
    }
    print(table(found))
    RESULTS.joinpath(f"compiling-{device}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
