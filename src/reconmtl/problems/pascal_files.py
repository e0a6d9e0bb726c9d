"""PASCAL-Context for five dense tasks, in the layout of PASCAL_MT.tgz.

    JPEGImages/ID.jpg, ImageSets/Context/{train,val}.txt (an ID per line),
    semseg/VOC12/ID.png or semseg/pascal-context/ID.png (0..20, 255 ignored), human_parts/ID.mat (PASCAL-Part's `anno`),
    sal_distill/ID.png, normals_distill/ID.png, pascal-context/trainval/ID.mat (`LabelMap`, 459 classes; for edges, and
    to know where normals can be trusted).

Images keep their size: they are padded to a square, and while training enlarged or shrunk, cropped and mirrored.

Reference: Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019 (layout and labels); Bruggemann et al.,
BMTAS, BMVC 2020 (padding and augmentation).
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from reconmtl.boundaries import label_edges
from reconmtl.errors import DataError, missing_extra
from reconmtl.problems.dense_files import directions, mirrored
from reconmtl.problems.matlab import read_matlab

TASKS = ("semantic", "parts", "saliency", "normal", "edge")
COUNTS = {"train": 4998, "val": 5105}
SOURCE = "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz (33,224 png, 10,103 jpg, 20,206 mat)"
IGNORED = 255
PIXELS = 2**24
"""Of an image, at most: memory is taken for as many as a file claims to have."""
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Factors of size that are drawn from, each as likely as the others."""
PERSON = 15
"""The category of people in PASCAL-Part."""

_HEAD = ("head", "hair", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose")
PARTS = {
    **dict.fromkeys(_HEAD, 1),
    **dict.fromkeys(("torso", "neck"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("llarm", "rlarm", "lhand", "rhand"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("llleg", "rlleg", "lfoot", "rfoot"), 6),
}
"""The 24 names of PASCAL-Part for parts of people, as 6 labels; 0 is the background."""

# fmt: off
TRUSTED = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 328,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)
# fmt: on
"""Classes of `LabelMap` where the normals count: the 169 names that NYUv2's classes share, and tvmonitor. The normals
come from a network that was trained on NYUv2; elsewhere they mean nothing."""

_FILES = {
    "image": ("JPEGImages/{}.jpg",),
    "semantic": ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"),
    "parts": ("human_parts/{}.mat",),
    "saliency": ("sal_distill/{}.png",),
    "normal": ("normals_distill/{}.png",),
    "classes": ("pascal-context/trainval/{}.mat",),
}
_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class PascalFolder:
    """One split; items are (image [3, size, size] standardised as ImageNet's, {task: target}).

    Targets [size, size] of whole numbers: semantic 0..20, parts 0..6 (all ignored in images without people); [1, size,
    size]: saliency and edge, 0 or 1; 255 is ignored. normal [3, size, size] has length one, zeros where unknown.

    Args:
        root: The folder PASCAL_MT.
        split: "train" or "val".
        tasks: Whose targets are wanted.
        size: Side that images are padded to [pixels].
        augment: Scale, crop and mirror at random, from PyTorch's global random state.

    Raises:
        DataError: If anything is missing or odd; all of it is listed.
        MissingExtraError: If Pillow is not installed.
    """

    def __init__(
        self, root: str | Path, split: str, *, tasks: Sequence[str] = TASKS, size: int = 512, augment: bool = False
    ) -> None:
        unknown = [t for t in tasks if t not in TASKS]
        if split not in COUNTS or unknown or not isinstance(size, int) or size < 32:
            raise DataError(
                f"split = {split!r}, tasks {unknown}, size = {size!r}: expected one of {list(COUNTS)}, some of "
                f"{TASKS}, a side of at least 32 pixels."
            )
        self.root, self.tasks, self.size, self.augment = Path(root).expanduser(), tuple(tasks), size, augment
        wanted = ["image", *(t for t in self.tasks if t != "edge")]
        self.wanted = wanted + ["classes"] * bool({"edge", "normal"} & set(self.tasks))
        self.ids, self.files = _check(self.root, split, self.wanted, size, augment)
        self.fingerprint = f"pascal_context-{split}-{len(self.ids)}-{size}"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} images, no number {index}.")
        maps = read_maps({name: paths[index % len(self)] for name, paths in self.files.items()})
        scale = SCALES[int(torch.randint(len(SCALES), ()))] if self.augment else 1.0
        found = prepared(maps, self.tasks, scale)
        found = fitted(found, self.size, corner=_corner(found["image"], self.size) if self.augment else (0, 0))
        if self.augment and bool(torch.rand(()) < 0.5):
            found = mirrored(found)
        return found.pop("image"), {
            t: x[0].long() if t in ("semantic", "parts") else x for t, x in ((t, found[t]) for t in self.tasks)
        }


def _corner(image: Tensor, size: int) -> tuple[int, int]:
    """Where a random crop begins; a side that is no longer than the crop begins at 0."""
    top, left = (int(torch.randint(max(0, s - size) + 1, ())) for s in image.shape[-2:])
    return top, left


def prepared(maps: Mapping[str, NDArray[Any]], tasks: Sequence[str], scale: float) -> dict[str, Tensor]:
    """The image and the tasks' targets [C, H', W'] float32, scaled; edges are found after scaling, so they stay thin.

    Args:
        maps: What `read_maps` returned.
        tasks: Whose targets are wanted.
        scale: Factor of height and width.
    """
    height, width = maps["image"].shape[:2]
    size = (max(1, round(height * scale)), max(1, round(width * scale)))

    def nearest(x: Tensor) -> Tensor:
        return F.interpolate(x[None], size, mode="nearest")[0]

    image = torch.from_numpy(maps["image"]).movedim(-1, 0).float() / 255
    found = {"image": F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0].sub(_MEAN).div(_STD)}
    for task in tasks:
        if task == "edge":
            classes = nearest(torch.from_numpy(maps["classes"].astype(np.float32))[None])[0].numpy().astype(np.int64)
            found[task] = torch.from_numpy(label_edges(classes))[None].float()
        elif task == "normal":
            normal = directions(torch.from_numpy(maps["normal"]).movedim(-1, 0)[None].float() * (2 / 255) - 1)[0]
            known = torch.from_numpy(np.isin(maps["classes"], TRUSTED))
            found[task] = nearest(torch.where(known, normal, 0.0))
        elif task == "saliency":
            found[task] = nearest(torch.from_numpy((maps[task] > 127).astype(np.float32))[None])
        else:
            found[task] = nearest(torch.from_numpy(maps[task].astype(np.float32))[None])
    return found


def fitted(maps: Mapping[str, Tensor], size: int, *, corner: tuple[int, int]) -> dict[str, Tensor]:
    """Cut out [C, size, size] from `corner` on; what lies outside is grey, ignored, or without a normal."""
    top, left = corner
    found = {}
    for name, x in maps.items():
        part = x[:, top : top + size, left : left + size]
        right, below = size - part.shape[2], size - part.shape[1]
        found[name] = F.pad(part, (0, right, 0, below), value=0.0 if name in ("image", "normal") else float(IGNORED))
    return found


def read_maps(files: Mapping[str, Path]) -> dict[str, NDArray[Any]]:
    """Read an image and its labels, [H, W] or [H, W, 3], all of the image's size.

    Raises:
        DataError: If a file is damaged or odd; it is named.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, path in files.items():
        if name == "parts":
            found[name] = _read_parts(path, found["image"].shape[:2])
        elif name == "classes":
            found[name] = _label_map(path)
        else:
            found[name] = _read_image(path, colours=name in ("image", "normal"))
    height, width = found["image"].shape[:2]
    for name, x in found.items():
        if x.shape[:2] != (height, width):
            raise DataError(f"{files[name]}: size {list(x.shape[:2])}, its image has {[height, width]}. {_AGAIN}")
    limits = {"semantic": 20, "parts": 6, "classes": 459}
    for name, most in limits.items():
        if name in found:
            odd = (found[name] > most) & (found[name] != IGNORED if name != "classes" else True)
            if odd.any():
                raise DataError(f"{files[name]}: labels such as {found[name][odd][0]}, expected 0 to {most}. {_AGAIN}")
    return found


_AGAIN = f"Get the file again ({SOURCE})."


def _read_image(path: Path, *, colours: bool) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise missing_extra("PASCAL-Context", "pascal") from None
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"it claims {image.width} x {image.height} pixels")
            # Labels are the palette's indices, not its colours.
            return np.array(image.convert("RGB") if colours else image if image.mode in "PL" else image.convert("L"))
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise DataError(f"{path} cannot be decoded: {error}. {_AGAIN}") from None


def _label_map(path: Path) -> NDArray[np.int64]:
    found = _variable(path, "LabelMap")
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path}: LabelMap is {type(found).__name__}, expected whole numbers [H, W]. {_AGAIN}")
    if found.ndim != 2 or found.dtype.kind not in "ui" or (found < 0).any():
        raise DataError(
            f"{path}: LabelMap is {found.dtype} {list(found.shape)}, expected whole numbers [H, W]. {_AGAIN}"
        )
    return cast("NDArray[np.int64]", found.astype(np.int64))


def _variable(path: Path, name: str) -> Any:  # noqa: ANN401 MATLAB's arrays hold anything
    try:
        return read_matlab(path, name)
    except DataError as error:
        raise DataError(f"{error} {_AGAIN}") from None


def _read_parts(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Labels of the parts of people; all 255 if there is none."""
    anno = _variable(path, "anno")
    target = np.zeros(size, dtype=np.uint8)
    try:
        _, things = anno[0].values()
        for _, number, _, parts in (thing.values() for thing in things):  # class, class_ind, mask, parts
            if int(number[0, 0]) != PERSON or len(parts) == 0:
                continue
            for name, mask in (part.values() for part in parts):
                target[mask.astype(bool)] = PARTS[name]
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not as PASCAL-Part's annotations are: {error!r}. {_AGAIN}") from None
    return target if target.any() else np.full(size, IGNORED, dtype=np.uint8)


def _check(
    root: Path, split: str, wanted: Sequence[str], size: int, augment: bool
) -> tuple[list[str], dict[str, list[Path]]]:
    """The IDs, and each one's files; whether all are there, and whether the first and the last can be read."""
    listing = root / "ImageSets" / "Context" / f"{split}.txt"
    try:
        ids = listing.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"PASCAL-Context is not in {root}: {listing} cannot be read ({error}). Get {SOURCE}.") from None
    faults = [f"{listing}: names no image"] * (not ids)
    odd = [i for i in ids if "/" in i or "\\" in i or i in (".", "..")]
    if odd or len(set(ids)) != len(ids):
        faults.append(f"{listing}: IDs that are no file names, or twice the same: {odd[:3]}")
    files: dict[str, list[Path]] = {}
    for name in wanted:
        there = {p.format("{}"): _listed(root / Path(p).parent) for p in _FILES[name]}
        paths = []
        for i in ids:
            at = next((p for p in _FILES[name] if Path(p.format(i)).name in there[p]), None)
            paths.append(root / (at or _FILES[name][0]).format(i))
        files[name] = paths
        missing = [
            i for i, p in zip(ids, paths, strict=True) if not any(Path(q.format(i)).name in s for q, s in there.items())
        ]
        if missing:
            where = " or ".join(str(root / Path(p).parent) for p in _FILES[name])
            faults.append(f"{where}: {len(missing)} of {len(ids)} files are missing, e.g. {', '.join(missing[:3])}")
    for k in sorted({0, len(ids) - 1}) if not faults else ():
        try:
            maps = read_maps({name: paths[k] for name, paths in files.items()})
            if not augment and max(maps["image"].shape[:2]) > size:
                faults.append(
                    f"{files['image'][k]}: {list(maps['image'].shape[:2])} pixels do not fit into size = {size}; what "
                    "is cut off would not be judged"
                )
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(
            f"PASCAL-Context cannot be read from {root}:\n- "
            + "\n- ".join(faults)
            + f"\nIt is to be had here: {SOURCE}"
        )
    if len(ids) != COUNTS[split]:
        warnings.warn(
            f"PASCAL-Context, {split}: {len(ids)} images, published are {COUNTS[split]}; results will differ.",
            stacklevel=3,
        )
    return ids, files


def _listed(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()
