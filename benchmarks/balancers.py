"""What one training step of each method costs, relative to joint training.

    python benchmarks/balancers.py            # some 6 minutes on one core; writes benchmarks/results/balancers.json
    python benchmarks/balancers.py --table    # prints the file as Markdown and puts it into docs/balancers.md
    python benchmarks/balancers.py --quick    # a smaller network and few rounds, writes nothing
    python benchmarks/balancers.py --solver   # CAGrad's weights by our solver and by TorchJD's, which needs cvxpy

ResNet18 on images of 36 x 36, with two and with eight tasks. All methods take turns in one process, in another order in
every round; times are process CPU time on one thread. A step is zero_grad, forward, backward and whatever the method
does; no optimizer. `probe` records conflicts and trains jointly. Before each step of a method a step of `probe` is
timed, and its ratio to that is taken pair by pair: what balancing adds to measuring. A number is the median over
rounds, the interval that of 95 % from 4000 resamples of the rounds.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.balance import Balancer
from reconmtl.balancers import BALANCERS
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


def measure(tasks: int, width: int, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Per method: whether a Gram matrix is enough for it, and its time relative to joint, and to the probe."""
    rows = steps(tasks, width, batch)
    times: dict[str, list[tuple[float, float]]] = {n: [] for n in rows}  # of the probe just before, and of the method
    for step in rows.values():
        step()  # warm-up, and the probe's comparison of engines
    order = list(rows)
    for k in range(rounds):
        random.Random(k).shuffle(order)
        for name in order:
            times[name].append((_timed(rows["probe"]), _timed(rows[name])))
    joint = [own for _, own in times["joint"]]
    found: dict[str, dict[str, Any]] = {}
    for name, pairs in times.items():
        ratios = [own / probe for probe, own in pairs]
        found[name] = {
            "gram": _from_gram(name),
            "joint": median(own / j for (_, own), j in zip(pairs, joint, strict=True)),
            "probe": [*_interval(ratios), median(ratios)],
        }
    return found


def _timed(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _from_gram(name: str) -> bool:
    spec = name.removesuffix(", not recorded")
    return spec in BALANCERS and Balancer(spec, ["a", "b"]).rule.takes == "gram"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of resampled values."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(4000))
    return medians[100], medians[-101]


def table(found: dict[str, Any]) -> str:
    """The results as Markdown; methods that take the Gram matrix stand first."""
    cases = found["cases"]
    last = cases[list(cases)[-1]]
    names = sorted(last, key=lambda n: (not last[n]["gram"], last[n]["joint"]))
    lines = ["| one step of | G | " + " | ".join(f"{c}, x joint | x probe (95 %)" for c in cases) + " |"]
    lines.append("|---|:-:|" + "--:|--:|" * len(cases))
    for name in names:
        cells = []
        for case in cases.values():
            row = case.get(name)
            if row is None:
                cells += ["", ""]
            else:
                low, high, middle = row["probe"]
                cells += [f"{row['joint']:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        lines.append(f"| {name} | {'G' if last[name]['gram'] else ''} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{found['about']}"])


def solver() -> None:
    """Milliseconds of CAGrad's weights, by TorchJD's solver and by ours."""
    from torchjd.aggregation import CAGradWeighting

    print("| T | TorchJD's, ms | ours, ms |\n|--:|--:|--:|")
    for tasks in (2, 8, 40):
        spent = [0.0, 0.0]
        theirs, ours = CAGradWeighting(c=0.4, norm_eps=1e-20), Balancer("cagrad:c=0.4", [str(i) for i in range(tasks)])
        for seed in range(21):
            rows = torch.randn(tasks, 100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            gram = rows @ rows.T
            took = [_timed(partial(theirs, gram)), _timed(partial(ours.weights, gram))]
            spent = [total + t * (seed > 0) / 20 for total, t in zip(spent, took, strict=True)]  # the first warms up
        print(f"| {tasks} | {1e3 * spent[0]:.2f} | {1e3 * spent[1]:.2f} |")


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--solver", action="store_true")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.solver:
        solver()
        return
    if options.table:
        text = table(json.loads(RESULTS.read_text()))
        before, _, rest = DOCS.read_text().partition(MARKS[0])
        DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        print(text)
        return
    width, batch, rounds = (8, 8, 3) if options.quick else (options.width, options.batch, options.rounds)
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
