"""What measuring conflicts costs: the probe against plain training, T plain backward passes, and other ways to do it.

    python benchmarks/probe.py                  # a quarter of an hour on one core; writes benchmarks/results/probe.json
    python benchmarks/probe.py --only a e       # some cases; the others keep their results in the file
    python benchmarks/probe.py --run            # a training with overhead=0.1 against one that measures every step
    python benchmarks/probe.py --table          # prints the file as Markdown and puts it into docs/probing.md
    python benchmarks/probe.py --quick          # a minute: small networks, few rounds, writes nothing

All rows of a case take turns in one process, so that what slows the machine slows all; times are process CPU time on
one thread, or CUDA events with `--device cuda`. A number is the median over rounds of the ratio within a round. A step
is zero_grad, forward, backward and everything that is measured; no optimizer. Memory is the peak of a fresh process
after two steps, above that of the joint step.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from probe_rows import CORE, ROWS, Steps
from workloads import Workload, workloads

import reconmtl as rm
from reconmtl.gram import Gradients
from reconmtl.problems import multifashion
from reconmtl.schedule import REHEARSAL, Schedule

RESULTS = Path(__file__).parent / "results" / "probe.json"
DOCS = Path(__file__).parents[1] / "docs" / "probing.md"
MARKS = "<!-- benchmark:probe -->", "<!-- /benchmark:probe -->"
MEMORY = [r for r in ROWS if r not in {"plain", "plain_gemm"}]


def rows_of(name: str) -> list[str]:
    """Rows that this machine can run."""
    have = not missing("torchjd")
    return [r for r in ROWS if (have or not r.startswith("torchjd")) and not (r == "torchjd_vmap" and name == "b40")]


def missing(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return True
    return False


def clock(device: str) -> float:
    """Seconds of work so far: of this process, or of the accelerator's queue once it is empty."""
    if device == "cpu":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    torch.cuda.synchronize()
    return ORIGIN[0].elapsed_time(event) / 1000


ORIGIN: list[Any] = []


def time_rows(name: str, workload: Workload, device: str) -> dict[str, Any]:
    """Time every row of a case, in turns."""
    steps, rows = Steps(workload, device), rows_of(name)
    for row in rows:
        if row != "published":  # it has nothing to warm up, and 40 tasks take it long
            getattr(steps, row)()
    times: dict[str, list[float | None]] = {row: [] for row in rows}
    for k in range(workload.rounds):
        for row in rows if k % 2 else rows[::-1]:
            if row not in CORE and k >= max(1, workload.rounds // 2):
                times[row].append(None)
                continue
            began = clock(device)
            getattr(steps, row)()
            times[row].append(clock(device) - began)
    out = {}
    for row, own in times.items():
        entry: dict[str, Any] = {"ms": 1000 * median(t for t in own if t is not None)}
        for base in ("joint", "plain"):
            ratios = [a / b for a, b in zip(own, times[base], strict=True) if a is not None and b is not None]
            entry[f"per_{base}"] = median(ratios)
            entry[f"per_{base}_quartiles"] = quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None
        entry["rounds"] = len(ratios)
        out[row] = entry
    engines = steps.gradients["auto"].engines
    return {
        "title": workload.title,
        "tasks": workload.tasks,
        "target": workload.target,
        "layers": len(engines),
        "delta_layers": [n for n, e in engines.items() if e == "delta"],
        "rows": out,
        "sampled": sampled(steps, device),
    }


def sampled(steps: Steps, device: str) -> dict[str, Any]:
    """Average step of a probe that measures one in ten, or as many as a budget of ten percent allows."""
    out = {}
    with_budget = rm.Probe(steps.model, overhead=0.1)
    for _ in REHEARSAL:
        steps.probe(with_budget)
    for name, every in (("every_10", 10), ("overhead_0.1", with_budget.every)):
        probe, warm = rm.Probe(steps.model, every=every), rm.Probe(steps.model)
        warm._gradients = probe._gradients
        steps.probe(warm)
        rounds, few = math.ceil(30 / every), min(every, 20)
        spent = plain = 0.0
        for _ in range(rounds):  # in turns with joint steps
            began = clock(device)
            for _ in range(every):
                steps.probe(probe)
            spent += (clock(device) - began) / every
            began = clock(device)
            for _ in range(few):
                steps.joint()
            plain += (clock(device) - began) / few
        out[name] = {"every": every, "ms": 1000 * spent / rounds, "per_joint": spent / plain}
    return out


def peak(name: str, row: str, arguments: argparse.Namespace) -> float:
    """Peak megabytes of a fresh process after two steps of one row."""
    command = [sys.executable, __file__, "--peak", name, row, "--device", arguments.device]
    command += ["--quick"] if arguments.quick else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, row: str, arguments: argparse.Namespace) -> None:
    steps = Steps(workloads(quick=arguments.quick)[name], arguments.device)
    for _ in range(2):
        getattr(steps, row)()
    if arguments.device == "cpu":
        # not `ru_maxrss`: a child process inherits what its parent held when it was started
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
    else:
        print(torch.cuda.max_memory_allocated() / 2**20)


def environment(device: str) -> dict[str, Any]:
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    versions = {p: version(p) for p in ("torch", "torchjd") if not missing(p)}
    name = cpu.partition(": ")[2] or platform.processor()
    if device != "cpu":
        name = torch.cuda.get_device_name()
    return {"python": platform.python_version(), **versions, "machine": name, "load": round(os.getloadavg()[0], 1)}


class Watch:
    """Notes when each step of a training ends, by process time, and whether it was measured."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.measured: list[bool] = []

    @contextmanager
    def over(self) -> Iterator[None]:
        """Watch every probe that is used inside."""
        backward, sweep, watch = rm.Probe.backward, Gradients.sweep, self
        seen = [False]

        def noted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 whatever they are
            seen[0] = True
            return sweep(*args, **kwargs)

        def timed(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            seen[0] = False
            backward(*args, **kwargs)
            watch.ends.append(time.process_time())
            watch.measured.append(seen[0])

        with patch.object(rm.Probe, "backward", timed), patch.object(Gradients, "sweep", noted):
            yield

    def ratios(self) -> tuple[float, float]:
        """Mean step of all, and mean measured step, as ratios to the mean of the steps that were not measured."""
        steps = [b - a for a, b in pairwise(self.ends)]
        kinds = self.measured[1:]
        plain = fmean(s for s, m in zip(steps, kinds, strict=True) if not m)
        return fmean(steps) / plain, fmean(s for s, m in zip(steps, kinds, strict=True) if m) / plain


def training(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train Multi-Fashion+MNIST, small, with a budget and without: what it costs, and how far the rankings differ.

    What it costs is read off one training, in which measured steps and others take turns. Yields what is known after
    each seed.
    """
    options = multifashion.PRESETS["demo"]
    epochs = 1 if arguments.quick else multifashion.PRESETS["paper"].probe_epochs
    problem = multifashion.make(width=8, data="mini")
    problem = problem.replace(
        recipe=problem.recipe.override(epochs=epochs, batch_size=options.batch_size, lr=options.lr)
    )
    budget, every, ratios = [], [], []
    for seed in range(2):
        watch = Watch()
        with watch.over():
            log = rm.probe(problem, epochs=epochs, seed=seed, overhead=0.1)
        ratios.append(watch.ratios())
        budget.append(log)
        every.append(rm.probe(problem, epochs=epochs, seed=seed))
        few, all_ = ([log.rank(severity=options.severity) for log in logs] for logs in (budget, every))
        yield {
            "problem": f"Multi-Fashion+MNIST, 12,000 images, ResNet18 width 8, {epochs} epochs of batch "
            f"{options.batch_size}, S = {options.severity}",
            "seeds": list(range(seed + 1)),
            "measured_steps": [log.steps for log in budget],
            "all_steps": every[0].steps,
            "budget_per_joint": [r[0] for r in ratios],
            "measured_step_per_joint": [r[1] for r in ratios],
            "distance_to_every_step": [a.distance(b) for a, b in zip(few, all_, strict=True)],
            "distance_between_seeds": [a.distance(b) for a, b in combinations(all_, 2)],
            "layers": len(all_[0].layers),
            "environment": environment("cpu"),
        }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: time against T backward passes, in a training, and memory."""

    def number(entry: dict[str, Any] | None, key: str, form: str = ".2f") -> str:
        return "-" if entry is None or entry.get(key) is None else format(entry[key], form)

    cases = results.get("cases", {})
    shown = [r for r in ROWS if r not in {"joint", "plain"} and any(r in c["rows"] for c in cases.values())]
    lines = ["Time of a step, as a ratio to T plain backward passes:", ""]
    lines += ["| case | T | joint, ms | T passes, ms | " + " | ".join(f"`{r}`" for r in shown) + " | aim of `auto` |"]
    lines += ["|---|--:|--:|--:|" + "--:|" * (len(shown) + 1)]
    for name, c in cases.items():
        rows = c["rows"]
        cells = [number(rows.get(r), "per_plain") for r in shown]
        base = [number(rows["joint"], "ms", ".0f"), number(rows["plain"], "ms", ".0f")]
        lines.append(
            f"| {name}: {c['title']} | {' | '.join([str(c['tasks']), *base, *cells, str(c['target'] or '-')])} |"
        )
    lines += ["", "Time of an average training step, as a ratio to the joint step:", ""]
    lines += ["| case | T passes | `flat` | `auto` | `auto`, every=10 | `auto`, overhead=0.1 | one step of |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for name, c in cases.items():
        cells = [number(c["rows"][r], "per_joint") for r in ("plain", "flat", "auto")]
        few, budget = c["sampled"]["every_10"], c["sampled"]["overhead_0.1"]
        cells += [number(few, "per_joint"), number(budget, "per_joint"), str(budget["every"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    held = [r for r in MEMORY if r != "joint" and any("extra_mb" in c["rows"].get(r, {}) for c in cases.values())]
    lines += ["", "Peak memory above that of the joint step, MB:", ""]
    lines += ["| case | " + " | ".join(f"`{r}`" for r in held) + " |", "|---|" + "--:|" * len(held)]
    for name, c in cases.items():
        lines.append(f"| {name} | " + " | ".join(number(c["rows"].get(r), "extra_mb", ".0f") for r in held) + " |")
    if run := results.get("run"):

        def list_of(key: str) -> str:
            return ", ".join(f"{v:.2f}" for v in run[key])

        lines += [
            "",
            f"A training ({run['problem']}; seeds {', '.join(map(str, run['seeds']))}), probed with `overhead=0.1`, "
            f"measured {', '.join(map(str, run['measured_steps']))} of {run['all_steps']} steps. Its average step took "
            f"{list_of('budget_per_joint')} times as long as one that is not measured; a measured one "
            f"{list_of('measured_step_per_joint')} times. Distance (Eq. 22) of its ranking of {run['layers']} layers "
            f"to that of a training which measures every step: {list_of('distance_to_every_step')}; between seeds, "
            f"measuring every step: {list_of('distance_between_seeds') or '-'}.",
        ]
    return "\n".join(lines) + "\n"


LEGEND = """
`flat` and `auto` are the probe, its update included. `plain_gemm` is T plain passes in which the layers that `auto`
measures at their output take their weight gradients by the same matrix product: what `auto` gains over it is the
algorithm, the rest is a faster kernel. `torchjd` and `torchjd_vmap` are TorchJD's `mtl_backward`, task by task and all
at once, with Grams from `.jac`. `libmtl` restates how LibMTL takes gradients, and `published` how the paper describes
it; both are our code, not theirs.
"""


def legend(results: dict[str, Any]) -> str:
    """What the rows are, and where they were measured."""
    cases = results.get("cases", {})
    places = {
        ", ".join(f"{k} {v}" for k, v in c["environment"].items() if k not in {"machine", "load"})
        + f", {c['environment']['machine']}"
        for c in cases.values()
    }
    loads = sorted(c["environment"]["load"] for c in cases.values())
    busy = f" Other programs ran: the load average was {loads[0]} to {loads[-1]}." if loads and loads[-1] > 1.5 else ""
    return f"One thread, process CPU time; {'; '.join(sorted(places))}.{busy}\n{LEGEND}\n"


def put(text: str) -> None:
    """Replace what stands between the marks in the docs."""
    begin, end = MARKS
    page = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    if begin not in page or end not in page:
        print(f"{DOCS} has no place for the table, between {begin} and {end}: not written.", file=sys.stderr)
        return
    head, rest = page.split(begin, 1)
    DOCS.write_text(f"{head}{begin}\n{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def load() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def keep(part: str, value: dict[str, Any]) -> None:
    """Merge into the file: a case that was not run again stays as it is."""
    results = load()
    results[part] = {**results.get(part, {}), **value} if part == "cases" else value
    if part == "cases":
        order = list(workloads(quick=False))
        results[part] = dict(sorted(results[part].items(), key=lambda c: order.index(c[0])))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases whose names start with one of these")
    parser.add_argument("--quick", action="store_true", help="small networks, few rounds; writes nothing")
    parser.add_argument("--no-memory", action="store_true", help="no fresh processes for peaks")
    parser.add_argument("--run", action="store_true", help="train with a budget, and without")
    parser.add_argument("--table", action="store_true", help="print the file, and put it into the docs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cpu":  # other users of the machine must not decide what a budget allows
        Schedule.__init__.__kwdefaults__["clock"] = time.process_time  # type: ignore[index]
    if arguments.device != "cpu":
        ORIGIN.append(torch.cuda.Event(enable_timing=True))
        ORIGIN[0].record()
    if arguments.peak:
        print_peak(*arguments.peak, arguments)
    elif arguments.table:
        text = legend(load()) + table(load())
        print(text)
        put(text)
    elif arguments.run:
        for found in training(arguments):
            print(table({"run": found}).partition("A training")[2], flush=True)
            if not arguments.quick:
                keep("run", {"command": " ".join(["python", *sys.argv]), **found})
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    every = workloads(quick=arguments.quick)
    done: dict[str, Any] = {}
    for name, workload in every.items():
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        found = time_rows(name, workload, arguments.device)
        if not arguments.no_memory:
            base = peak(name, "joint", arguments)
            for row in MEMORY:
                if row in found["rows"]:
                    found["rows"][row]["extra_mb"] = peak(name, row, arguments) - base
        found = {**found, "environment": environment(arguments.device), "command": " ".join(["python", *sys.argv])}
        done[name] = found
        print(table({"cases": {name: found}}), flush=True)
        if not arguments.quick:
            keep("cases", {name: found})
    if missing("torchjd"):
        print("TorchJD is not installed: its rows were left out.")


if __name__ == "__main__":
    main()
