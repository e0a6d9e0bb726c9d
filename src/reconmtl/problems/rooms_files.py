"""Write drawn rooms in the file layouts of the field's data sets: to try a pipeline before the real data is at hand."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reconmtl.errors import DataError
from reconmtl.files import write_bytes
from reconmtl.problems.rooms import COARSE, Room, draw

BASELINE = 0.3
"""Disparity of a point one metre away."""


def _hwc(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.moveaxis(array.astype(np.float32), 0, -1)


def cityscapes_maps(room: Room) -> dict[str, NDArray[np.float32]]:
    """A room as CityScapes' files: 7 classes, a disparity in place of the depth."""
    coarse = np.where(room.semantic < 0, -1, np.array(COARSE)[room.semantic]).astype(np.float32)
    with np.errstate(divide="ignore"):
        disparity = np.where(room.depth > 0, BASELINE / room.depth, 0)[..., None].astype(np.float32)
    return {"image": _hwc(room.image / 255), "label_7": coarse, "depth": disparity}


def nyuv2_maps(room: Room) -> dict[str, NDArray[np.float32]]:
    """A room as NYUv2's files: 13 classes, depth in metres, normals."""
    return {
        "image": _hwc(room.image / 255),
        "label": room.semantic.astype(np.float32),
        "depth": room.depth[..., None],
        "normal": _hwc(room.normal),
    }


MAPS: dict[str, Callable[[Room], dict[str, NDArray[np.float32]]]] = {
    "cityscapes": cityscapes_maps,
    "nyuv2": nyuv2_maps,
}


def write_npy_folders(
    root: str | Path, layout: str, *, counts: Mapping[str, int], seed: int = 0, size: tuple[int, int] = (64, 96)
) -> None:
    """Write rooms as {root}/{split}/{image,label,...}/{i}.npy, as MTAN publishes CityScapes and NYUv2.

    Args:
        root: Where to.
        layout: "cityscapes" or "nyuv2".
        counts: {split: number of rooms}.
        seed: Of the rooms.
        size: Height and width [pixels].

    Raises:
        DataError: If the layout is unknown.
        RunError: If a file cannot be written.
    """
    if layout not in MAPS:
        raise DataError(f"Unknown layout {layout!r}: expected one of {list(MAPS)}.")
    for number, (split, count) in enumerate(counts.items()):
        for i in range(count):
            maps = MAPS[layout](draw(i + number * 10**6, seed=seed, size=size))
            for name, array in maps.items():
                write_bytes(Path(root) / split / name / f"{i}.npy", partial(_save, array))


def _save(array: NDArray[np.float32], path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
