"""A tiny data set in CelebA's published layouts."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from reconmtl.networks.resnet import CELEBA_ATTRIBUTES

N = 12


def write(root: Path, layout: str) -> np.ndarray:
    """Write a tiny data set in one of the published layouts; returns labels [N, 40]."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, (N, 40))
    names = [f"{i + 1:06d}.jpg" for i in range(N)]
    parts = [0] * 6 + [1] * 2 + [2] * 4
    images = (
        root
        / {
            "official": "Img/img_align_celeba",
            "torchvision": "celeba/img_align_celeba",
            "kaggle": "img_align_celeba/img_align_celeba",
        }[layout]
    )
    images.mkdir(parents=True)
    for i, name in enumerate(names):
        color = np.full((218, 178, 3), 20 * i, dtype=np.uint8)
        color[:109] = 255 - 20 * i
        Image.fromarray(color).save(images / name, quality=95)
    if layout == "kaggle":
        for stem, header, rows in (
            (
                "list_attr_celeba",
                ["image_id", *CELEBA_ATTRIBUTES],
                [[n, *(2 * y - 1)] for n, y in zip(names, labels, strict=True)],
            ),
            ("list_eval_partition", ["image_id", "partition"], list(zip(names, parts, strict=True))),
        ):
            with (root / f"{stem}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([header, *rows])
        return labels
    folders = {"official": ("Anno", "Eval"), "torchvision": ("celeba", "celeba")}[layout]
    attributes = [str(N), " ".join(CELEBA_ATTRIBUTES) + " "]
    attributes += [f"{n}  " + " ".join(f"{2 * v - 1:2d}" for v in y) for n, y in zip(names, labels, strict=True)]
    for folder, stem, lines in (
        (folders[0], "list_attr_celeba", attributes),
        (folders[1], "list_eval_partition", [f"{n} {p}" for n, p in zip(names, parts, strict=True)]),
    ):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{stem}.txt").write_text("\n".join(lines) + "\n")
    return labels
