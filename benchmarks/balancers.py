"""What one training step of each method costs, relative to joint training.

    python benchmarks/balancers.py            # minutes on one core; writes benchmarks/results/balancers.json
    python benchmarks/balancers.py --table    # prints the file as Markdown and puts it into docs/balancers.md
    python benchmarks/balancers.py --quick    # a smaller network and few rounds, writes nothing

ResNet18 on images of 36 x 36, with two and with eight tasks. All methods take turns in one process; times are process
CPU time on one thread. A step is zero_grad, forward, backward and whatever the method does; no optimizer. A number is
the median over rounds of the ratio within a round. `probe` records conflicts and trains jointly: what a balancer adds
to it is the number beside it.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.balance import BALANCERS, Balancer
from reconmtl.networks import resnet
from reconmtl.networks.cross_stitch import CrossStitch
from reconmtl.networks.mmoe import mmoe
from reconmtl.probing import Probe
from reconmtl.rotograd import RotoGrad, rotated

RESULTS = Path(__file__).parent / "results" / "balancers.json"
DOCS = Path(__file__).parents[1] / "docs" / "balancers.md"
MARKS = "<!-- benchmark:balancers -->", "<!-- /benchmark:balancers -->"


def steps(tasks: int, width: int, batch: int) -> dict[str, Callable[[], None]]:
    """Every method's step by name."""
    torch.manual_seed(0)
    names = [f"t{i}" for i in range(tasks)]
    make = partial(resnet.multifashion, width=width, tasks=names)
    x = torch.rand(batch, 1, 36, 36)
    y = {t: torch.randint(10, (batch,)) for t in names}
    net = make()

    def losses(model: nn.Module) -> dict[str, Tensor]:
        return {t: F.cross_entropy(out, y[t]) for t, out in model(x).items()}

    def plain(model: nn.Module) -> None:
        model.zero_grad()
        torch.stack(list(losses(model).values())).sum().backward()

    def probed(model: nn.Module, probe: Probe) -> None:
        model.zero_grad()
        probe.backward(losses(model))

    rows: dict[str, Callable[[], None]] = {"joint": partial(plain, net), "probe": partial(probed, net, Probe(net))}
    for name in BALANCERS:
        if name != "joint" and not (tasks < 3 and name in ("krum", "trimmed-mean")):
            rows[name] = partial(probed, net, Probe(net, balancer=Balancer(name, names)))
            if name in ("cagrad", "mgda", "pcgrad"):
                rows[f"{name}, not recorded"] = partial(probed, net, Probe(net, start=2**60, balancer=name))
    turned = rotated(make(), 100)
    rows["rotograd"] = partial(probed, turned, Probe(turned, start=2**60, balancer=RotoGrad(turned, tuple(names))))
    rows["mmoe"] = partial(plain, mmoe(make, x))
    rows["cross-stitch"] = partial(plain, CrossStitch(lambda _: make(), names))
    rows["single"] = partial(_singles, [resnet.multifashion(width=width, tasks=[t]) for t in names], x, y)
    return rows


def _singles(networks: list[Any], x: Tensor, y: dict[str, Tensor]) -> None:
    for net, (task, target) in zip(networks, y.items(), strict=True):
        net.zero_grad()
        F.cross_entropy(net(x)[task], target).backward()


def measure(tasks: int, width: int, batch: int, rounds: int) -> dict[str, float]:
    """Each method's time relative to joint, and to the probe."""
    rows = steps(tasks, width, batch)
    times: dict[str, list[float]] = {n: [] for n in rows}
    for name, step in rows.items():
        step()  # warm-up, and the probe's comparison of engines
        del name
    for _ in range(rounds):
        for name, step in rows.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    return {n: median(t / j for t, j in zip(times[n], times["joint"], strict=True)) for n in rows}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    cases = list(found["cases"])
    names = sorted(found["cases"][cases[-1]], key=lambda n: found["cases"][cases[-1]][n])
    lines = ["| one step of | " + " | ".join(f"{c}, x joint | x probe" for c in cases) + " |"]
    lines.append("|---|" + "--:|--:|" * len(cases))
    for name in names:
        cells = []
        for c in cases:
            value, probe = found["cases"][c].get(name), found["cases"][c]["probe"]
            cells += ["", ""] if value is None else [f"{value:.2f}", f"{value / probe:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{found['about']}"])


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.table:
        text = table(json.loads(RESULTS.read_text()))
        before, _, rest = DOCS.read_text().partition(MARKS[0])
        DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        print(text)
        return
    torch.set_num_threads(1)
    width, batch, rounds = (8, 8, 1) if options.quick else (options.width, options.batch, options.rounds)
    cases = {f"T = {tasks}": measure(tasks, width, batch, rounds) for tasks in (2, 8)}
    about = (
        f"ResNet18 of width {width}, batch {batch}, {rounds} rounds, one thread of {platform.processor() or 'a CPU'} "
        f"({os.cpu_count()} cores), torch {torch.__version__}."
    )
    found = {"about": about, "cases": cases}
    print(table(found))
    if not options.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
