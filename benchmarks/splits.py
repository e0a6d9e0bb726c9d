"""Splits every layer of every network of the zoo, alone, and counts what comes out: right, or refused and why.

A split counts as right if its outputs are those of one copy of the network per task bit for bit, in train and eval mode
(dropout off), and if `verify` passes in float64 once the copies differ: outputs, gradients, buffers against ordinary
networks. `--hf`: the Hugging Face architectures of the tests instead. From the repository:
`python benchmarks/splits.py`.
"""

import argparse
import copy
import re
import sys
import time
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.errors import ReconError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting import split, verify
from reconmtl.splitting.outputs import get_task
from reconmtl.splitting.structure import Value, tensors, transform

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "unit")]
ZOO: Any = import_module("zoo")
TASKS: tuple[str, ...] = ZOO.TASKS
KINDS = {
    r"are one parameter \(tied\)": "one of several tied layers alone",
    r"none of its parameters reaches an output": "reaches no output",
    r"reaches the output of .* alone": "reaches one task's output alone",
    r"differ between tasks|depend on the task": "Python values that differ between tasks",
    r"in place": "writes in place into what tasks share",
}


def kind(error: ReconError) -> str:
    """Why a split was refused."""
    return next((text for pattern, text in KINDS.items() if re.search(pattern, str(error))), str(error)[:200])


def double(value: Value) -> Value:
    return transform(value, lambda t: t.double() if t.is_floating_point() else t)


def same(a: Value, b: Value) -> bool:
    x, y = list(tensors(a)), list(tensors(b))
    return len(x) == len(y) > 0 and all(torch.equal(u, v) for u, v in zip(x, y, strict=True))


def outcome(
    net: nn.Module, layers: list[str], sample: dict[str, Any], atomic: tuple[str, ...], tolerance: float
) -> str:
    """ "right", or why it was refused; anything else is "WRONG"."""
    plan = Plan(tasks=TASKS, layers=layers)
    args, kwargs = sample["args"], sample["kwargs"]
    try:
        for training in (True, False):
            net.train(training)
            out = split(net, plan, atomic=atomic)(*args, **kwargs)
            for t in TASKS:
                if not same(get_task(out, t), get_task(copy.deepcopy(net)(*args, **kwargs), t)):
                    return f"WRONG: output of {t}"
        model = split(net.train(), plan, atomic=atomic)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.02)
        found = verify(model, sample["named"] if args and kwargs else args or kwargs)
    except ReconError as error:
        return "refused: " + kind(error)
    if found.output > tolerance or found.gradient > tolerance:
        return f"WRONG: output {found.output:.1e}, gradient {found.gradient:.1e}"
    return "right"


def zoo() -> list[tuple[str, nn.Module, dict[str, Any], tuple[str, ...], float]]:
    found = []
    for name, entry in {**ZOO.ZOO, **ZOO.LIBRARY}.items():
        args, kwargs = double(entry.inputs()), double(entry.keywords())
        first = {"keywords": "parts"}.get(name, "x")
        sample = {"args": args, "kwargs": kwargs, "named": {first: args[0] if args else None, **kwargs}}
        found.append((name, ZOO.without_dropout(ZOO.build(name)).double(), sample, entry.atomic, 1e-10))
    return found


def hugging_face() -> list[tuple[str, nn.Module, dict[str, Any], tuple[str, ...], float]]:
    tests: Any = import_module("test_transformers")
    found = []
    for name, arch in tests.ARCHITECTURES.items():
        net, inputs = tests.build(arch)
        sample = {"args": (), "kwargs": double(inputs), "named": {}}
        found.append((name, net.double(), sample, (), tests.SINGLE if arch.single else tests.TOLERANCE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", action="store_true", help="the Hugging Face architectures instead")
    parser.add_argument("names", nargs="*", help="these networks only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    nets = hugging_face() if options.hf else zoo()
    nets = [n for n in nets if not options.names or n[0] in options.names]
    start = time.process_time()
    for name, net, sample, atomic, tolerance in nets:
        mine: Counter[str] = Counter()
        layers = [[layer.name] for layer in find_layers(net)]
        tied = {id(p): [] for p in net.parameters()}  # type: dict[int, list[str]]
        for n, m in net.named_modules():
            for p in m._parameters.values():
                if isinstance(p, Tensor) and n not in tied[id(p)]:
                    tied[id(p)].append(n)
        layers += [owners for owners in tied.values() if len(owners) > 1]
        for one in layers:
            mine[outcome(net, one, sample, atomic, tolerance)] += 1
        total += mine
        print(f"{name:20} " + ", ".join(f"{k}: {v}" for k, v in sorted(mine.items(), reverse=True)), flush=True)
    print(f"\n{len(nets)} networks, {sum(total.values())} splits, {time.process_time() - start:.0f} s of CPU")
    for text, count in total.most_common():
        print(f"{count:6} {text}")
    if any(text.startswith("WRONG") for text in total):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
