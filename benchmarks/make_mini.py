"""Write the mini set that ships inside the package: the first images of MNIST and of Fashion-MNIST.

    python benchmarks/make_mini.py DIR

DIR holds the original files (`mnist/`, `fashion-mnist/`). Prints the sha256 that `multifashion_data.MINI_SHA256` holds.
"""

import sys
from pathlib import Path

import numpy as np

from reconmtl.files import write_bytes
from reconmtl.problems import idx
from reconmtl.problems.multifashion_data import content_hash

TARGET = Path(__file__).parents[1] / "src/reconmtl/problems/multifashion_mini.npz"
COUNTS = {"train": 6000, "t10k": 1000}


def main(folder: str) -> None:
    files = idx.read(folder)
    arrays = {
        f"{source}_{split}_{kind}": files[f"{source}/{split}-{kind}-idx{rank}-ubyte"][:count]
        for source in ("mnist", "fashion-mnist")
        for split, count in COUNTS.items()
        for kind, rank in (("images", 3), ("labels", 1))
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            np.savez_compressed(handle, allow_pickle=False, **arrays)

    write_bytes(TARGET, write)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, content sha256 {content_hash(arrays)}")


if __name__ == "__main__":
    main(sys.argv[1])
