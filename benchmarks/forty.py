"""Forty tasks on a CPU: time of a joint, a probed and a split step, in turns, and the most memory the process held.

python benchmarks/forty.py --width 8 --batch 64
"""

import argparse
import json
import resource
import statistics
import time

import torch

import reconmtl as rm
from reconmtl.batches import call
from reconmtl.problem import Problem
from reconmtl.problems import celeba


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem: Problem = celeba.make(width=options.width)
    indices = torch.arange(options.batch)
    x, targets = problem.batch(problem.train, indices, torch.device("cpu"))
    joint, probed = problem.model(), problem.model()
    probe = rm.Probe(probed)
    found: dict[str, list[float]] = {}

    def step(name: str, model: torch.nn.Module) -> None:
        model.zero_grad()
        start = time.process_time()
        losses = problem.losses(call(model, x), targets)
        if name == "probed":
            probe.backward(losses)
        else:
            torch.stack(list(losses.values())).sum().backward()
        found.setdefault(name, []).append(time.process_time() - start)

    def memory() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    peaks = {"data": memory()}
    for name, model in (("joint", joint), ("probed", probed)):
        step(name, model)
        peaks[name] = memory()
    plan = probe.log.rank(severity=-0.05).top(25)
    divided = rm.split(problem.model(), plan, sample=problem.sample())
    step("split", divided)
    peaks["split"] = memory()
    found.clear()
    for _ in range(options.rounds):
        for name, model in (("joint", joint), ("probed", probed), ("split", divided)):
            step(name, model)
    seconds = {name: statistics.median(times) for name, times in found.items()}
    print(
        json.dumps(
            {"tasks": 40, **vars(options), "processor_seconds_per_step": seconds, "peak_mb_so_far": peaks}, indent=1
        )
    )


if __name__ == "__main__":
    main()
