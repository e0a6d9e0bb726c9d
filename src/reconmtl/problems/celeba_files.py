"""CelebA on disk, in the official folders, torchvision's or Kaggle's, decoded once into a memory-mapped cache.

Reference: Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015.
"""

import csv
import hashlib
import itertools
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reconmtl.errors import DataError, RunError, missing_extra
from reconmtl.files import cache_folder, read_json, write_json
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.progress import bar

SPLITS = {"train": 0, "val": 1, "test": 2}
COUNTS = {"train": 162770, "val": 19867, "test": 19962}
SIDE = 64
"""Of the cached images [pixels]."""
PIXELS = 2**24
"""Of an image, at most: memory is taken for as many as a file claims to have."""
CHUNK = 1024
"""Images per checksum, and between two notes of how far the cache is filled."""
FORMAT = "reconmtl.celeba/1"
SOURCE = (
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (img_align_celeba.zip, list_attr_celeba.txt, "
    "list_eval_partition.txt), or Kaggle's jessicali9530/celeba-dataset"
)

_ATTRIBUTES = ("Anno/list_attr_celeba", "celeba/list_attr_celeba", "list_attr_celeba")
_PARTITION = ("Eval/list_eval_partition", "celeba/list_eval_partition", "list_eval_partition")
_IMAGES = ("Img/img_align_celeba", "celeba/img_align_celeba", "img_align_celeba/img_align_celeba", "img_align_celeba")


Mapped = np.memmap[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Listing:
    """What a folder says it holds.

    Attributes:
        images: Folder of the images.
        names: File name of each image.
        labels: [N, 40] uint8, 0 or 1.
        parts: [N] uint8: 0 train, 1 val, 2 test.
    """

    images: Path
    names: tuple[str, ...]
    labels: NDArray[np.uint8]
    parts: NDArray[np.uint8]


def read_listing(root: str | Path) -> Listing:
    """Find out which layout a folder has, and read its lists.

    Raises:
        DataError: If anything is missing or odd; all of it is listed.
    """
    folder = Path(root).expanduser()
    lists = {what: _find(folder, names) for what, names in (("attributes", _ATTRIBUTES), ("partition", _PARTITION))}
    images = next((folder / n for n in _IMAGES if (folder / n).is_dir()), None)
    faults = [
        f"no {names[-1]}.txt or .csv, neither there nor in {', '.join(n.split('/')[0] for n in names[:-1])}/"
        for what, names in (("attributes", _ATTRIBUTES), ("partition", _PARTITION))
        if lists[what] is None
    ]
    faults += [] if images is not None else [f"no folder with the images: one of {', '.join(_IMAGES)}"]
    if faults:
        raise DataError(f"CelebA is not in {folder}:\n- " + "\n- ".join(faults) + f"\nIt is to be had here: {SOURCE}")
    attributes, partition = lists["attributes"], lists["partition"]
    assert attributes is not None and partition is not None and images is not None
    rows, found = _attributes(attributes), _partition(partition)
    missing = [n for n in rows if n not in found]
    if missing or len(rows) != len(found):
        faults.append(f"{attributes.name} has {len(rows)} images, {partition.name} {len(found)}; e.g. {missing[:3]}")
    absent = sorted(set(rows) - {p.name for p in images.iterdir()})
    if absent:
        faults.append(f"{images}: {len(absent)} images are missing, e.g. {', '.join(absent[:3])}")
    if faults:
        raise DataError(f"CelebA in {folder} is incomplete:\n- " + "\n- ".join(faults))
    names = tuple(rows)
    labels = np.array([rows[n] for n in names], dtype=np.uint8)
    return Listing(images, names, labels, np.array([found[n] for n in names], dtype=np.uint8))


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    paths = (folder / f"{name}.{end}" for name in names for end in ("txt", "csv"))
    return next((p for p in paths if p.is_file()), None)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of every line of a list."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file) if path.suffix == ".csv" else (line.split() for line in file)
            yield from ((i, row) for i, row in enumerate(lines, start=1) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _attributes(path: Path) -> dict[str, list[int]]:
    """{file name: 40 zeros and ones}."""
    rows = _rows(path)
    header: list[str] = []
    for _, row in itertools.islice(rows, 2 if path.suffix == ".txt" else 1):
        header = row
    names = header[1:] if path.suffix == ".csv" else header
    if tuple(names) != CELEBA_ATTRIBUTES:
        raise DataError(
            f"{path}: expected the 40 attributes in their published order, found {names[:3]} ... ({len(names)})."
        )
    found: dict[str, list[int]] = {}
    for line, row in rows:
        if len(row) != 41 or not set(row[1:]) <= {"1", "-1", "0"} or not _is_name(row[0]):
            raise DataError(f"{path}, line {line}: expected a file name and 40 times 1 or -1, found {row[:4]} ...")
        found[row[0]] = [int(v == "1") for v in row[1:]]
    return found


def _partition(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line, row in _rows(path):
        if path.suffix == ".csv" and line == 1:
            continue
        if len(row) != 2 or row[1] not in ("0", "1", "2") or not _is_name(row[0]):
            raise DataError(f"{path}, line {line}: expected a file name and 0, 1 or 2, found {row[:4]}.")
        found[row[0]] = int(row[1])
    return found


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


class CelebA:
    """One split; items are (image [3, 64, 64] standardised as ImageNet's, {attribute: 0 or 1}).

    Args:
        images: [N, 3, 64, 64] uint8, in memory or mapped.
        labels: [N, 40] uint8.
        tasks: Some of the 40 attributes.
        fingerprint: Names the data.

    Raises:
        DataError: If shapes or dtypes do not fit, or an attribute is unknown.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.uint8], *, tasks: Sequence[str], fingerprint: str
    ) -> None:
        unknown = [t for t in tasks if t not in CELEBA_ATTRIBUTES]
        if unknown or images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise DataError(
                f"images {images.dtype} {list(images.shape)}, labels {list(labels.shape)}, unknown attributes "
                f"{unknown}: expected uint8 [N, 3, H, W] and labels [N, 40]."
            )
        self.images, self.labels, self.tasks, self.fingerprint = images, labels, tuple(tasks), fingerprint
        self.columns = [CELEBA_ATTRIBUTES.index(t) for t in self.tasks]
        self.mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        self.std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} images, no number {index}.")
        images, targets = self.batch(torch.tensor([index]))
        return images[0], {t: y[0] for t, y in targets.items()}

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images at `indices` [n] at once: [n, 3, 64, 64], and a target [n] per attribute."""
        at = indices.numpy()
        images = torch.from_numpy(self.images[at]).float().div_(255).sub_(self.mean).div_(self.std)
        labels = torch.from_numpy(self.labels[at][:, self.columns]).long()
        return images, dict(zip(self.tasks, labels.unbind(1), strict=True))


def load_split(
    root: str | Path, split: str, *, tasks: Sequence[str] = CELEBA_ATTRIBUTES, cache: Path | None = None
) -> CelebA:
    """A split of CelebA; its images are decoded and resized on the first call, and mapped from a file ever after.

    Args:
        root: The folder, in any of the three layouts.
        split: "train", "val" or "test".
        tasks: Some of the attributes.
        cache: Where decoded images are kept; None: the platform's cache folder.

    Raises:
        DataError: If anything is missing or odd, or an image cannot be decoded.
        RunError: If the cache cannot be written.
        MissingExtraError: If Pillow is needed and not installed.
    """
    if split not in SPLITS:
        raise DataError(f"split = {split!r}: expected one of {list(SPLITS)}.")
    listing = read_listing(root)
    at = np.flatnonzero(listing.parts == SPLITS[split])
    if len(at) == 0:
        raise DataError(f"CelebA in {root}: no image belongs to {split}.")
    if len(at) != COUNTS[split]:
        warnings.warn(f"CelebA, {split}: {len(at)} images, published are {COUNTS[split]}.", stacklevel=2)
    names = [listing.names[i] for i in at]
    mark = hashlib.sha256("\n".join([FORMAT, str(listing.images.resolve()), split, *names]).encode()).hexdigest()[:16]
    folder = (cache or cache_folder()) / f"celeba-{split}-{mark}"
    images = decoded(listing.images, names, folder)
    return CelebA(images, listing.labels[at], tasks=tasks, fingerprint=f"celeba-{split}-{mark}")


def decoded(source: Path, names: Sequence[str], folder: Path) -> NDArray[np.uint8]:
    """Decode and resize images into a file, from where an earlier call was interrupted, and map it.

    Args:
        source: Folder of the images.
        names: Which of them, in order.
        folder: Where the file is kept, with notes of what it holds.

    Returns:
        [N, 3, 64, 64] uint8, mapped to memory.

    Raises:
        DataError: If an image cannot be decoded, or the file does not hold what was noted.
    """
    notes, data = folder / "notes.json", folder / "images.npy"
    shape = (len(names), 3, SIDE, SIDE)
    checks = _read_notes(notes, shape)
    chunks = [range(i, min(i + CHUNK, len(names))) for i in range(0, len(names), CHUNK)]
    if len(checks) < len(chunks):
        fresh = not checks or not data.exists()
        checks = [] if fresh else checks
        images = _made(data, shape) if fresh else _mapped(data, shape, "r+")
        with bar(len(names), f"decoding into {folder.name}", "image") as progress:
            progress.update(sum(len(c) for c in chunks[: len(checks)]))
            for chunk in chunks[len(checks) :]:
                for i in chunk:
                    images[i] = _decode(source / names[i])
                images.flush()
                checks.append(zlib.crc32(images[chunk.start : chunk.stop].tobytes()))
                write_json(notes, {"format": FORMAT, "shape": shape, "crc32": checks})
                progress.update(len(chunk))
        del images
    return _verified(data, shape, chunks, checks)


def _verified(data: Path, shape: tuple[int, ...], chunks: Sequence[range], checks: Sequence[int]) -> NDArray[np.uint8]:
    """Map the file and compare its first, middle and last chunk with what was noted."""
    images = _mapped(data, shape, "r")
    for i in {0, len(chunks) // 2, len(chunks) - 1}:
        if zlib.crc32(images[chunks[i].start : chunks[i].stop].tobytes()) != checks[i]:
            raise _damaged(data)
    return images


def _made(data: Path, shape: tuple[int, ...]) -> Mapped:
    """A new file of images, mapped to memory."""
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(data, mode="w+", dtype=np.uint8, shape=shape)
    except OSError as error:
        raise RunError(
            f"Cannot write {data}: {error.strerror or error}. Free space, or choose another cache."
        ) from None


def _mapped(data: Path, shape: tuple[int, ...], mode: Literal["r", "r+"]) -> Mapped:
    """The file of images, mapped to memory, if it is what it should be."""
    try:
        images = np.load(data, mmap_mode=mode, allow_pickle=False)
    except Exception:  # NumPy parses the header as Python, which a damaged one can fail in any way
        raise _damaged(data) from None
    if not isinstance(images, np.memmap) or images.shape != shape or images.dtype != np.uint8:
        raise _damaged(data)
    return images


def _damaged(file: Path) -> DataError:
    return DataError(f"{file} is damaged: delete the folder {file.parent}, and the images are decoded again.")


def _read_notes(path: Path, shape: tuple[int, ...]) -> list[int]:
    """Checksums of the chunks that are done; none if there are no notes."""
    if not path.exists():
        return []
    notes = read_json(path, DataError)
    checks = notes.get("crc32") if isinstance(notes, Mapping) else None
    whole = isinstance(checks, list) and all(isinstance(c, int) for c in checks)
    if not whole or notes.get("shape") != list(shape) or notes.get("format") != FORMAT:
        raise _damaged(path)
    return list(checks)  # type: ignore[arg-type]


def _decode(path: Path) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise missing_extra("Decoding images", "images") from None
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"it claims {image.width} x {image.height} pixels")
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise DataError(f"{path} cannot be decoded: {error}. Get the file again ({SOURCE}).") from None
    pixels: NDArray[np.uint8] = np.moveaxis(np.asarray(small), -1, 0)
    return pixels


def generated(n: int, *, seed: int, tasks: Sequence[str] = CELEBA_ATTRIBUTES) -> CelebA:
    """Made-up images of CelebA's shape: each attribute is a faint disk at a place and of a colour of its own.

    Neighbouring attributes' disks overlap, and attributes come in groups that occur together, as real ones do.

    Args:
        n: Number of images.
        seed: Of the images; what the attributes look like is always the same.
        tasks: Some of the attributes.
    """
    look, draw = np.random.Generator(np.random.PCG64(0)), np.random.Generator(np.random.PCG64([1, seed]))
    count = len(CELEBA_ATTRIBUTES)
    y, x = np.mgrid[:SIDE, :SIDE]
    centers = look.uniform(10, SIDE - 10, (count, 2))
    disks = np.exp(-((y - centers[:, :1, None]) ** 2 + (x - centers[:, 1:, None]) ** 2) / 60)
    colors = look.uniform(-1, 1, (count, 3))
    shared = draw.random((n, 8))[:, np.arange(count) // 5]
    labels = (0.5 * draw.random((n, count)) + 0.5 * shared > 0.5).astype(np.uint8)
    images = np.empty((n, 3, SIDE, SIDE), dtype=np.uint8)
    basis = (disks[:, None] * colors[..., None, None]).reshape(count, -1).astype(np.float32)
    for part in np.array_split(np.arange(n), max(1, n // 500)):
        flat = 128 + 45 * (labels[part].astype(np.float32) - 0.5) @ basis
        flat += 20 * draw.standard_normal(flat.shape, dtype=np.float32)
        images[part] = np.clip(flat, 0, 255).reshape(-1, 3, SIDE, SIDE)
    return CelebA(images, labels, tasks=tasks, fingerprint=f"celeba-generated-{n}-{seed}")
