"""How fast each data set is read from generated files in its published layout and size, and what bounds it.

    python benchmarks/loaders.py --out benchmarks/results/loaders.json

Processor seconds of one process, which other programs disturb less than the clock; files are in the system's cache, so
that a slow disk comes on top. `bound by` is the function in which most of that time is spent itself (cProfile).
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from reconmtl.problems import cityscapes, nyuv2, qm9_data, scenes, yeast
from reconmtl.problems.celeba_files import CelebA, decoded, generated
from reconmtl.problems.dense_files import DenseFolder
from reconmtl.problems.pascal_files import PascalFolder
from reconmtl.problems.rooms import draw
from reconmtl.problems.rooms_files import write_npy_folders, write_pascal_folder

FILES = 12


def prepare(root: Path) -> dict[str, tuple[str, int, Callable[[], object]]]:
    """Write the files; per loader: the size of an item, how many a call reads, and the call."""
    write_npy_folders(root / "c", "cityscapes", counts={"train": FILES}, size=(128, 256))
    write_npy_folders(root / "n", "nyuv2", counts={"train": FILES}, size=(288, 384))
    write_pascal_folder(root / "p", counts={"train": FILES}, size=(375, 500))
    city = DenseFolder(root / "c", "train", layout=cityscapes.LAYOUT, augment=True)
    nyu = DenseFolder(root / "n", "train", layout=nyuv2.LAYOUT, augment=True)
    nyu_test = DenseFolder(root / "n", "train", layout=nyuv2.LAYOUT)
    four = ("semantic", "parts", "saliency", "normal")
    pascal = PascalFolder(root / "p", "train", tasks=four, augment=True)
    five = PascalFolder(root / "p", "train", augment=True)
    from PIL import Image

    random = np.random.Generator(np.random.PCG64(0))
    (root / "jpg").mkdir()
    names = [f"{i}.jpg" for i in range(200)]
    for i, name in enumerate(names):
        room = draw(i, size=(218, 178)).image
        Image.fromarray(np.ascontiguousarray(np.moveaxis(room, 0, -1))).save(root / "jpg" / name, quality=95)
    made = generated(2000, seed=0)
    np.save(root / "faces.npy", made.images)
    cached = CelebA(np.load(root / "faces.npy", mmap_mode="r"), made.labels, tasks=made.tasks, fingerprint="faces")
    fresh = iter(range(10**6))
    kept = scenes.Scenes(64)
    for i in range(64):
        kept.room(i)
    molecules = qm9_data.load()
    qm9 = qm9_data.QM9(
        molecules,
        random.permutation(len(molecules))[:2000],
        mean=np.zeros(11),
        std=np.ones(11),
        tasks=list(qm9_data.TARGETS),
        fingerprint="qm9",
    )
    genes = yeast.make().train

    def some(n: int, batch: int) -> torch.Tensor:
        return torch.randint(n, (batch,))

    return {
        "cityscapes, training": ("128 x 256", FILES, lambda: [city[i] for i in range(FILES)]),
        "nyuv2, training": ("288 x 384", FILES, lambda: [nyu[i] for i in range(FILES)]),
        "nyuv2, test": ("288 x 384", FILES, lambda: [nyu_test[i] for i in range(FILES)]),
        "pascal_context, training, 4 tasks": (
            "375 x 500 to 512 x 512",
            FILES,
            lambda: [pascal[i] for i in range(FILES)],
        ),
        "pascal_context, training, with edges": ("375 x 500 to 512 x 512", 4, lambda: [five[i] for i in range(4)]),
        "celeba, decoding (once)": (
            "178 x 218 to 64 x 64",
            200,
            lambda: decoded(root / "jpg", names, root / f"cache{next(fresh)}"),
        ),
        "celeba, from the cache": ("64 x 64", 256, lambda: cached.batch(some(2000, 256))),
        "scenes, drawing": ("64 x 96", 32, lambda: scenes.Scenes(32).batch(torch.arange(32))),
        "scenes, drawn before": ("64 x 96", 64, lambda: kept.batch(torch.arange(64))),
        "qm9": ("18 atoms on average", 120, lambda: qm9.batch(some(2000, 120))),
        "yeast": ("103 numbers", 50, lambda: genes.batch(some(1500, 50))),
    }


def measure(call: Callable[[], object], seconds: float) -> tuple[float, str, float]:
    """Processor seconds per call, the function with most time of its own, and its share."""
    call()
    calls, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        call()
        calls += 1
    profile = cProfile.Profile()
    profile.runcall(call)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(entry[2] for entry in stats.values())
    (file, _, function), entry = max(stats.items(), key=lambda item: item[1][2])
    name = function.strip("<>{}").replace("built-in method ", "").replace("method ", "").split(" of ")[0]
    return spent / calls, f"{Path(file).stem}.{name}" if file != "~" else name.strip("'"), entry[2] / total


def main() -> None:
    """Measure, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*published are.*")
    torch.set_num_threads(1)
    rows = []
    print("| loader | size | items per processor second | most time in | its share |\n|---|---|---:|---|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, items, call) in prepare(Path(folder)).items():
            seconds, function, share = measure(call, options.seconds)
            row = {"loader": name, "size": size, "per_second": items / seconds, "bound_by": function, "share": share}
            rows.append(row)
            print(f"| {name} | {size} | {items / seconds:,.0f} | `{function}` | {100 * share:.0f} % |", flush=True)
    if options.out is not None:
        content = {
            "command": f"python benchmarks/loaders.py --out {options.out}",
            "torch": torch.__version__,
            "rows": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
