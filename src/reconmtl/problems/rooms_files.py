"""Write drawn rooms in the file layouts of the field's data sets: to try a pipeline before the real data is at hand."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reconmtl.errors import DataError, missing_extra
from reconmtl.files import write_bytes
from reconmtl.problems.rooms import CLASSES, COARSE, Room, draw

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


VOC = {"table": 11, "person": 15, "bed": 18, "picture": 20}
"""Labels of PASCAL for things in rooms; all others are its background."""
CONTEXT = (158, 440, 68, 46, 397, 18, 10, 232, 287, 454, 115, 284, 330)
"""Labels of PASCAL-Context for the 13 classes; what is not labelled is its 431, unknown."""
LIMBS = {1: "head", 2: "torso", 3: "luarm", 4: "llarm", 5: "luleg", 6: "llleg"}
"""PASCAL-Part's names for the parts of drawn people; the left stands for both."""


def write_pascal_folder(
    root: str | Path, *, counts: Mapping[str, int], seed: int = 0, size: tuple[int, int] = (96, 128)
) -> None:
    """Write rooms in the layout of PASCAL_MT, as `reconmtl.problems.pascal_files` describes it.

    Args:
        root: Where to.
        counts: {"train" or "val": number of rooms}.
        seed: Of the rooms.
        size: Height and width [pixels].

    Raises:
        MissingExtraError: If Pillow or SciPy is not installed.
        RunError: If a file cannot be written.
    """
    try:
        from PIL import Image
        from scipy.io import savemat
    except ModuleNotFoundError:
        raise missing_extra("Writing PASCAL-Context's files", "pascal") from None
    folder = Path(root)

    def save_image(array: NDArray[np.uint8], path: Path) -> None:
        with path.open("wb") as file:
            Image.fromarray(array).save(file, format="JPEG" if array is image else "PNG", quality=95)

    def save_mat(content: dict[str, Any], path: Path) -> None:
        with path.open("wb") as file:
            savemat(file, content, do_compression=True)

    voc = np.array([VOC.get(name, 0) for name in CLASSES], dtype=np.uint8)
    for number, (split, count) in enumerate(counts.items()):
        names = [f"20{number:02}_{i:06}" for i in range(count)]
        for i, name in enumerate(names):
            room = draw(i + number * 10**6, seed=seed, size=size)
            image = np.ascontiguousarray(np.moveaxis(room.image, 0, -1))
            unseen = room.semantic < 0
            normal = np.rint((np.moveaxis(room.normal, 0, -1) + 1) * 127.5).astype(np.uint8)
            pictures = {
                "JPEGImages": image,
                "semseg/VOC12": np.where(unseen, np.uint8(255), voc[room.semantic]),
                "sal_distill": room.saliency * np.uint8(255),
                "normals_distill": normal,
            }
            for where, array in pictures.items():
                end = "jpg" if where == "JPEGImages" else "png"
                write_bytes(folder / where / f"{name}.{end}", partial(save_image, array))
            classes = np.where(unseen, 431, np.array(CONTEXT)[room.semantic]).astype(np.uint16)
            write_bytes(
                folder / "pascal-context" / "trainval" / f"{name}.mat", partial(save_mat, {"LabelMap": classes})
            )
            write_bytes(folder / "human_parts" / f"{name}.mat", partial(save_mat, {"anno": _annotation(name, room)}))
        listing = folder / "ImageSets" / "Context" / f"{split}.txt"
        write_bytes(listing, partial(_write_lines, names))


def _write_lines(lines: list[str], path: Path) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _annotation(name: str, room: Room) -> dict[str, Any]:
    """PASCAL-Part's annotation of a room: its table without parts, and its person with them."""
    things: list[tuple[str, int, NDArray[np.uint8], Any]] = []
    table, person = (room.semantic == CLASSES.index(n) for n in ("table", "person"))
    if table.any():
        things.append(("diningtable", 11, table.astype(np.uint8), np.zeros((0, 0))))
    if person.any():
        parts = [(limb, (room.parts == i).astype(np.uint8)) for i, limb in LIMBS.items() if (room.parts == i).any()]
        kind = np.dtype([("part_name", object), ("mask", object)])
        things.append(("person", 15, person.astype(np.uint8), np.array([parts], dtype=kind)))
    kind = np.dtype([("class", object), ("class_ind", object), ("mask", object), ("parts", object)])
    return {"imname": name, "objects": np.array([things], dtype=kind)}
