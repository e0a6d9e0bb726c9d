"""What branched values cost: a split ResNet18 against the same branches written by hand, in one process.

    python benchmarks/split.py            # several minutes on one core; writes benchmarks/results/split.json
    python benchmarks/split.py --quick    # half a minute; the small network only, few rounds, writes nothing

Both sides take turns, so that what slows the machine slows both; times are process CPU time on one thread. A number is
the median over rounds of (split / by hand) within a round, with the interval that holds the true median in 95 of 100
cases (order statistics). Noise of a single round is 3 to 5 %.
"""

import argparse
import copy
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from reconmtl.networks import resnet
from reconmtl.plan import Plan
from reconmtl.splitting import split, view

RESULTS = Path(__file__).parent / "results"
TASKS = ("a", "b", "c")
PLAN = Plan(
    tasks=TASKS, layers=["layer3.0.conv1", "layer3.1.conv2", "layer4.0.bn1", "layer4.1.conv1", "layer4.1.conv2"]
)


class ByHand(nn.Module):
    """The network with the layers of PLAN per task, as one writes it: other weights shared, statistics per task."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        net = copy.deepcopy(net)
        self.net = net
        shared = {id(p): p for n, p in net.named_parameters() if n.rpartition(".")[0] not in PLAN.layers}
        self.layer3 = nn.ModuleDict({t: copy.deepcopy(net.layer3, dict(shared)) for t in TASKS})
        self.layer4 = nn.ModuleDict({t: copy.deepcopy(net.layer4, dict(shared)) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        net = cast(Any, self.net)
        x = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))
        identity = net.layer3[0].downsample(x)  # before the first split layer: once
        out = {}
        for t in TASKS:
            first, second = cast(Any, self.layer3[t])
            y = first.bn2(first.conv2(first.relu(first.bn1(first.conv1(x)))))
            y += identity
            y = self.layer4[t](second(first.relu(y)))
            out[t] = net.heads[t](net.relu(net.fc(torch.flatten(net.avgpool(y), 1))))
        return out


# Measuring ----------------------------------------------------------------------------------------------------------


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int, at_least: float
) -> dict[str, Any]:
    """Ratio of the CPU times of two functions, taking turns."""
    repeat = max(1, int(at_least / max(seconds(second, 2) / 2, 1e-6)))
    ratios, times = [], []
    gc.collect()
    gc.disable()
    for i in range(rounds):
        if i % 2:
            b, a = seconds(second, repeat), seconds(first, repeat)
        else:
            a, b = seconds(first, repeat), seconds(second, repeat)
        ratios.append(a / b)
        times.append(b / repeat)
    gc.enable()
    ordered = sorted(ratios)
    k = max(0, int(rounds / 2 - 0.98 * rounds**0.5))
    return {
        "ratio": median(ratios),
        "interval": [ordered[k], ordered[rounds - 1 - k]],
        "rounds": rounds,
        "repeat": repeat,
        "milliseconds_of_the_second": 1000 * median(times),
    }


def seconds(function: Callable[[], object], repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        function()
    return time.process_time() - start


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that autograd keeps, every memory once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out
    return sum(kept.values())


def step(model: nn.Module, x: Tensor, tasks: tuple[str, ...] = TASKS) -> None:
    model.zero_grad(set_to_none=True)
    out = model(x)
    torch.stack([out[t].square().mean() for t in tasks]).sum().backward()


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def against_hand(width: int, batch: int, rounds: int, at_least: float) -> dict[str, Any]:
    torch.manual_seed(0)
    net, x = resnet.multifashion(width, tasks=TASKS), torch.randn(batch, 1, 36, 36)
    mine, hand = split(net, PLAN, sample=x), ByHand(net)
    out, expected = mine(x), hand(x)
    assert all(torch.equal(out[t], expected[t]) for t in TASKS), "the hand-written network computes something else"
    result: dict[str, Any] = {"width": width, "batch": batch, "layers": list(PLAN.layers), "tasks": len(TASKS)}
    result["step"] = interleaved(lambda: step(mine, x), lambda: step(hand, x), rounds, at_least)
    result["forward"] = interleaved(lambda: mine(x), lambda: hand(x), rounds, at_least)
    loop = split(net, PLAN, sample=x, mode="loop")
    result["loop_step"] = interleaved(lambda: step(loop, x), lambda: step(hand, x), rounds, at_least)
    one = view(mine, "b")
    result["view_step"] = interleaved(lambda: step(one, x, ("b",)), lambda: step(net, x, ("b",)), rounds, at_least)
    mine.eval(), hand.eval()
    result["inference"] = interleaved(lambda: infer(mine, x), lambda: infer(hand, x), rounds, at_least)
    one, net = view(mine, "b"), net.eval()
    result["view_inference"] = interleaved(lambda: infer(one, x), lambda: infer(net, x), rounds, at_least)
    result["kept_for_backward"] = {
        "split": kept_for_backward(mine.train(), x),
        "by_hand": kept_for_backward(hand.train(), x),
    }
    return result


def many_layers(rounds: int) -> dict[str, Any]:
    """Time to split a network of 300 layers (150 convolutions, each with its BatchNorm)."""
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(150)]
    net = nn.Sequential(*blocks)
    result: dict[str, Any] = {}
    for name, layers in (("25 layers", [f"{i}.0" for i in range(0, 150, 6)]), ("300 layers", ["*"])):
        plan = Plan(tasks=TASKS, layers=layers)
        times = [seconds(lambda plan=plan: split(net, plan), 1) for _ in range(rounds)]  # type: ignore[misc]
        result[name] = {"seconds": median(times), "rounds": rounds}
    result["deepcopy"] = {"seconds": median([seconds(lambda: copy.deepcopy(net), 1) for _ in range(rounds)])}
    return result


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(results: dict[str, Any]) -> str:
    lines = ["| ResNet18, 3 tasks, 5 split layers | measured | target |", "|---|---|---|"]
    for r in results["against_hand"]:
        name = f"width {r['width']}, batch {r['batch']}"
        small = r["width"] < 32
        targets = {"step": 1.15 if small else 1.05, "forward": 1.30 if small else 1.05}
        for key, text in (
            ("step", "training step / by hand"),
            ("forward", "training forward / by hand"),
            ("inference", "inference / by hand"),
            ("loop_step", "training step with mode='loop' / by hand"),
            ("view_step", "training step of a view / original"),
            ("view_inference", "inference of a view / original"),
        ):
            m = r[key]
            target = targets.get(key, 1.03 if key.startswith("view") else None)
            shown = f"<= {target:.2f}" if target else ""
            lines.append(
                f"| {name}: {text} | {m['ratio']:.3f} ({m['interval'][0]:.3f} to {m['interval'][1]:.3f}) | {shown} |"
            )
        kept = r["kept_for_backward"]
        lines.append(
            f"| {name}: bytes kept for backward, split / by hand | {kept['split']} / {kept['by_hand']} | equal |"
        )
    many = results["many_layers"]
    lines += [f"| splitting {n} of 300 | {many[n]['seconds']:.2f} s | <= 1 s |" for n in ("25 layers", "300 layers")]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small network only, few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    sizes = [(8, 4, 15, 0.1)] if quick else [(8, 4, 51, 0.3), (64, 64, 15, 0.5)]
    results = {
        "command": "python benchmarks/split.py" + (" --quick" if quick else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": 1,
        "against_hand": [against_hand(*size) for size in sizes],
        "many_layers": many_layers(3 if quick else 9),
    }
    print(table(results))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "split.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
