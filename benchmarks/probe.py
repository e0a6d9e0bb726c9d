"""What measuring conflicts costs: the probe's engines against plain training and against T plain backward passes.

    python benchmarks/probe.py                  # about 40 minutes on one core; writes benchmarks/results/probe.json
    python benchmarks/probe.py --quick          # a minute: small networks, few rounds, writes nothing
    python benchmarks/probe.py --only a e       # some workloads

All rows of a workload take turns in one process, so that what slows the machine slows all; times are process CPU time
on one thread. A number is the median over rounds of the ratio within a round. A step is zero_grad, forward, backward
and everything that is measured; no optimizer. Memory is the peak of a fresh process above that of the joint step's.

Rows: `joint` is one backward pass of the summed loss; `plain` is T backward passes, one per task, whose gradients are
dropped; `flat` and `auto` are the probe's engines, update included; `published` restates, from the description in the
paper and its appendix, the way in which its Grams were computed (a loop over tasks and layers, `normalize`, one dot
product per pair); it is no measurement of anybody's released code. `torchjd` is TorchJD's `mtl_backward` with per-layer
Grams from `.jac`, where TorchJD is installed.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.gram import Gradients, add_update
from reconmtl.networks import resnet

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "a64": 0.82,
    "a256": 0.82,
    "b2": None,
    "b8": 0.76,
    "b16": 0.76,
    "b40": 0.76,
    "c": 0.95,
    "d256": 1.1,
    "d512": 1.1,
    "e": 0.65,
}


class Headed(nn.Module):
    """Shared features and one head per task."""

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({f"t{i}": head for i, head in enumerate(heads)})


class Features(nn.Module):
    """The shared part of a ResNet18, flattened."""

    def __init__(self, net: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.net, self.pooled = net, pooled
        del net.heads  # type: ignore[operator]  # heads of our own stand in its place

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.features(x)  # type: ignore[operator]
        if not self.pooled:
            return x.flatten(1)
        out: Tensor = self.net.relu(self.net.fc(x.mean((2, 3))))  # type: ignore[operator]
        return out


def segnet(width: int) -> nn.Sequential:
    """Encoder and decoder of 3x3 convolutions, two per level, as SegNet has."""
    widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

    layers: list[nn.Module] = []
    for a, b in zip([3, *widths], widths, strict=False):
        layers += [*block(a, b), *block(b, b), *(block(b, b) if b >= 4 * width else []), nn.MaxPool2d(2)]
    for a, b in zip(widths[::-1], [*widths[-2::-1], width], strict=True):
        layers += [nn.Upsample(scale_factor=2), *block(a, a), *(block(a, a) if a >= 4 * width else []), *block(a, b)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Transformer encoder of four layers; features are the mean over 64 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.mean(1)


@dataclass(frozen=True)
class Workload:
    """A network, its input and what a head is."""

    make: Callable[[], Headed]
    inputs: Callable[[], Tensor]
    rounds: int


def workloads(*, quick: bool) -> dict[str, Workload]:
    w = 8 if quick else 64

    def linear(width: int, tasks: int) -> list[nn.Module]:
        return [nn.Linear(width, 2) for _ in range(tasks)]

    def fashion() -> Headed:
        return Headed(Features(resnet.multifashion(width=w), pooled=True), linear(100, 2))

    def celeba(tasks: int) -> Callable[[], Headed]:
        return lambda: Headed(Features(resnet.celeba(width=w), pooled=False), linear(32 * w, tasks))

    def scene() -> Headed:
        heads: list[nn.Module] = [nn.Sequential(nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, c, 1)) for c in (13, 1, 3)]
        return Headed(segnet(w), heads)

    def mlp() -> Headed:
        n = 128 if quick else 1024
        return Headed(nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(n, n), nn.ReLU()))), linear(n, 8))

    size, batch, wide = (64, 32) if quick else (128, 64), 4 if quick else 64, 64 if quick else 256
    out = {
        "a64": Workload(fashion, lambda: torch.rand(batch, 1, 36, 36), 9),
        "a256": Workload(fashion, lambda: torch.rand(4 * batch, 1, 36, 36), 5),
        **{
            f"b{t}": Workload(celeba(t), lambda: torch.rand(batch // 2, 3, 64, 64), r)
            for t, r in ((2, 7), (8, 5), (16, 5), (40, 3))
        },
        "c": Workload(scene, lambda: torch.rand(2 if quick else 4, 3, *size), 5),
        "d256": Workload(lambda: Headed(Encoder(wide), linear(wide, 8)), lambda: torch.randn(batch // 4, 64, wide), 5),
        "d512": Workload(
            lambda: Headed(Encoder(2 * wide), linear(2 * wide, 8)),
            lambda: torch.randn(batch // 8 or 1, 64, 2 * wide),
            5,
        ),
        "e": Workload(mlp, lambda: torch.randn(64, 128 if quick else 1024), 15),
    }
    return out if not quick else {k: Workload(v.make, v.inputs, 2) for k, v in out.items()}


class Steps:
    """One step of each row on one network."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self.model, self.x = workload.make(), workload.inputs()
        self.engines = {name: Gradients(self.model, engine=name) for name in ("flat", "auto")}
        self.layers = [m for m in self.model.trunk.modules() if any(True for _ in m.parameters(recurse=False))]

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.zero_grad()
        z = self.model.trunk(self.x)
        return z, {t: F.softplus(head(z)).mean() * (1 + i) for i, (t, head) in enumerate(self.model.heads.items())}

    def joint(self) -> None:
        torch.stack(list(self.forward()[1].values())).sum().backward()

    def plain(self) -> None:
        losses = self.forward()[1]
        for i, loss in enumerate(losses.values()):
            keep = i < len(losses) - 1
            torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=keep, allow_unused=True)

    def _sweep(self, engine: str) -> None:
        found = self.engines[engine].sweep(self.forward()[1])
        add_update(found.layout, found.total, found.own)

    def flat(self) -> None:
        self._sweep("flat")

    def auto(self) -> None:
        self._sweep("auto")

    def published(self) -> None:
        losses = self.forward()[1]
        shared = [list(m.parameters(recurse=False)) for m in self.layers]
        vectors: list[list[Tensor]] = []
        total = torch.zeros(sum(p.numel() for own in shared for p in own), len(losses))
        for i, loss in enumerate(losses.values()):
            loss.backward(retain_graph=True)
            vectors.append([torch.cat([p.grad.flatten() for p in own if p.grad is not None]) for own in shared])
            total[:, i] = torch.cat(vectors[-1])
            for own in shared:
                for p in own:
                    p.grad = None
        for k in range(len(shared)):
            for i in range(len(losses)):
                for j in range(i + 1, len(losses)):
                    (F.normalize(vectors[i][k], dim=0) * F.normalize(vectors[j][k], dim=0)).sum()
        start = 0
        summed = total.mean(1) * len(losses)
        for own in shared:
            for p in own:
                p.grad = summed[start : start + p.numel()].view(p.shape).clone()
                start += p.numel()

    def torchjd(self) -> None:
        from torchjd.autojac import mtl_backward  # type: ignore[import-not-found,import-untyped,unused-ignore]

        z, losses = self.forward()
        mtl_backward(list(losses.values()), features=z, parallel_chunk_size=1)
        for module in self.layers:
            gram = torch.zeros(len(losses), len(losses))
            for p in module.parameters(recurse=False):
                rows = p.jac.flatten(1)  # type: ignore[attr-defined]
                gram += rows @ rows.T
                p.grad = p.jac.sum(0)  # type: ignore[attr-defined]
                del p.jac  # type: ignore[attr-defined]


def rows_of(workload: str) -> list[str]:
    rows = ["joint", "plain", "flat", "auto"]
    if workload != "b40":  # minutes per step
        rows.append("published")
    try:
        import torchjd  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except ImportError:
        return rows
    return [*rows, "torchjd"]


def time_rows(name: str, workload: Workload) -> dict[str, object]:
    steps, rows = Steps(workload), rows_of(name)
    for row in rows:
        getattr(steps, row)()
    times: dict[str, list[float]] = {row: [] for row in rows}
    for k in range(workload.rounds):
        for row in rows if k % 2 else rows[::-1]:
            began = time.process_time()
            getattr(steps, row)()
            times[row].append(time.process_time() - began)
    out: dict[str, object] = {}
    for row, own in times.items():
        per_joint = [a / b for a, b in zip(own, times["joint"], strict=True)]
        per_plain = [a / b for a, b in zip(own, times["plain"], strict=True)]
        spread = quantiles(per_plain, n=4)
        out[row] = {
            "ms": 1000 * median(own),
            "per_joint": median(per_joint),
            "per_plain": median(per_plain),
            "per_plain_quartiles": [spread[0], spread[2]],
            "every_10_per_joint": 1 + (median(per_joint) - 1) / 10,
        }
    delta = sum(e == "delta" for e in steps.engines["auto"].engines.values())
    return {"rows": out, "delta_layers": delta, "layers": len(steps.engines["auto"].engines)}


def peak(name: str, row: str, *, quick: bool) -> float:
    """Peak megabytes of a fresh process after three steps of one row."""
    command = [sys.executable, __file__, "--peak", name, row, *(["--quick"] if quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = workloads(quick=arguments.quick)
    if arguments.peak:
        steps = Steps(every[arguments.peak[0]])
        for _ in range(3):
            getattr(steps, arguments.peak[1])()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    names = [n for n in every if not arguments.only or any(n.startswith(o) for o in arguments.only)]
    if "torchjd" not in rows_of(""):
        print("TorchJD is not installed: its rows are left out.")
    results: dict[str, object] = {}
    print("| workload | row | ms | x joint | x T plain | target | every=10, x joint | extra MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        found = time_rows(name, every[name])
        rows = found["rows"]
        assert isinstance(rows, dict)
        if not arguments.no_memory:
            base = peak(name, "joint", quick=arguments.quick)
            for row, entry in rows.items():
                entry["extra_mb"] = peak(name, row, quick=arguments.quick) - base
        for row, e in rows.items():
            target = TARGETS[name] if row == "auto" else {"flat": 1.9 if name == "e" else 1.2}.get(row)
            print(
                f"| {name} | {row} | {e['ms']:.0f} | {e['per_joint']:.2f} | {e['per_plain']:.2f} | {target or ''} "
                f"| {e['every_10_per_joint']:.2f} | {e.get('extra_mb', float('nan')):.0f} |",
                flush=True,
            )
        results[name] = found
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.processor()}
        content = {"command": " ".join(["python", *sys.argv]), "environment": machine, "workloads": results}
        (RESULTS / "probe.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
