"""What keeping a long recording of many tasks costs: time per step, disk, opening; CelebA's size by default.

    python benchmarks/log.py            # half a minute on one core; writes benchmarks/results/log.json
    python benchmarks/log.py --quick    # a quarter of the steps, writes nothing

Gram matrices of random gradients are handed to the recorder as a probe would; only the recorder is timed (process CPU
time, one thread). Targets: at most 1 ms per step, 60 MB on disk, 1 s to open, at least 16 windows of time.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from reconmtl.conflicts import ConflictLog
from reconmtl.layers import find_layers
from reconmtl.passes import Layout, Segment
from reconmtl.recording import Recorder

RESULT = Path(__file__).parent / "results" / "log.json"
LAYERS, TASKS, STEPS = 40, 40, 10_000


def record(steps: int) -> dict[str, float]:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(LAYERS)))
    everyone = tuple(range(TASKS))
    layout = Layout(
        tasks=tuple(f"t{i}" for i in everyone),
        segments=tuple(Segment(str(k), 2 * k, 2 * k + 2, everyone) for k in range(LAYERS)),
        shared=(),
        starts=(),
        owner=(),
        reached=(),
        exclusive=(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rows = torch.randn(50, LAYERS, TASKS, 8, generator=torch.Generator().manual_seed(0))
    grams = rows @ rows.mT
    recorder = Recorder(find_layers(model))
    began = time.process_time()
    for step in range(steps):
        recorder.add(layout, grams[step % len(grams)])
    log = recorder.log(every=1)
    spent = time.process_time() - began
    assert log.steps == steps
    out = {"steps": steps, "layers": LAYERS, "pairs": TASKS * (TASKS - 1) // 2, "ms_per_step": 1000 * spent / steps}
    with tempfile.TemporaryDirectory() as folder:
        log.save(folder)
        out["megabytes"] = sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20
        began = time.perf_counter()
        again = ConflictLog.load(folder)
        again.rank(severity=-0.1)
        out["seconds_to_open_and_rank"] = time.perf_counter() - began
    assert again.counts is not None
    out["windows"] = len(again.counts.lengths)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found = record(STEPS // 4 if quick else STEPS)
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    if not quick:
        RESULT.parent.mkdir(exist_ok=True)
        machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        content = {"command": " ".join(["python", *sys.argv]), "environment": machine, "result": found}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
