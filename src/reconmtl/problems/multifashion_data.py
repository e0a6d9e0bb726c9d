"""Multi-Fashion+MNIST: a handwritten digit top left, a garment bottom right, overlapping; two labels per image.

Three ways to have it: `load_mini` (ships with the package), `build_full` once and `load_full` from then on (composed
from the original files of MNIST and Fashion-MNIST), `load_published` (the file that earlier papers passed around).
"""

import copy
import hashlib
import importlib.resources
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from reconmtl.errors import DataError
from reconmtl.files import cache_folder as cache_folder
from reconmtl.files import read_json, write_bytes, write_json
from reconmtl.problems import idx
from reconmtl.problems.array_pickle import load_arrays

Bytes = NDArray[np.uint8]
Sample = tuple[Tensor, dict[str, Tensor]]

CANVAS = 36
"""Side of a composed image [pixels]."""
SIDE = 28
"""Side of a digit or garment [pixels]."""
SHIFTS = 5
"""A part's corner has this many places per direction: 0..4 for the digit, 4..8 for the garment."""

FORMAT = "reconmtl.multifashion/1"
MINI_SHA256 = "cae789db0ac6b5f7f2804d8a9e9bc2f79d6df1df2e2a30159d1b099028963733"

MISSING = """\
Build it once from the original files of MNIST and Fashion-MNIST:
  reconmtl data multifashion --from DIR      (DIR holds mnist/ and fashion-mnist/; needs no network)
  reconmtl data multifashion --download      (fetches them first)
The mini set, 12000 + 2000 real images that ship with the package, needs nothing: `load_mini()`."""


def content_hash(arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 over names, dtypes, shapes and bytes of arrays, independent of how they are stored and of their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def compose(
    digits: Bytes,
    digit_labels: Bytes,
    items: Bytes,
    item_labels: Bytes,
    *,
    seed: int | Sequence[int],
    copies: int = 2,
) -> tuple[Bytes, Bytes]:
    """Put each digit and a garment drawn at random on one canvas.

    The digit's corner lies in {0..4} x {0..4}, the garment's in {4..8} x {4..8}, uniformly and independently; where
    they overlap, the brighter pixel wins. Image i is made of digit `i % D`.

    Args:
        digits: [D, 28, 28] uint8.
        digit_labels: [D] uint8, 0..9.
        items: [G, 28, 28] uint8: garments of the same split; partners are drawn from all of them.
        item_labels: [G] uint8, 0..9.
        seed: Of a PCG64 generator; equal seeds give equal images.
        copies: Images per digit.

    Returns:
        Images [D * copies, 36, 36] and labels [D * copies, 2] (digit, garment), both uint8.

    Raises:
        DataError: If shapes or dtypes do not fit.

    Reference: Lin et al., Pareto Multi-Task Learning, NeurIPS 2019, section 6.1 (the generating code is unpublished).
    """
    faults = [
        f"{name}: {a.dtype} {list(a.shape)}"
        for name, a in (("digits", digits), ("items", items))
        if a.dtype != np.uint8 or a.ndim != 3 or a.shape[1:] != (SIDE, SIDE) or len(a) == 0
    ]
    faults += [
        f"{name}: {a.dtype} {list(a.shape)} for {count} images"
        for name, a, count in (("digit_labels", digit_labels, len(digits)), ("item_labels", item_labels, len(items)))
        if a.dtype != np.uint8 or a.shape != (count,)
    ]
    if faults:
        raise DataError(
            "Cannot compose images: expected uint8, images [N, 28, 28] and labels [N]; found " + "; ".join(faults) + "."
        )
    try:
        random = np.random.Generator(np.random.PCG64(seed))
    except (TypeError, ValueError) as error:
        raise DataError(f"seed = {seed!r} cannot be used: {error}. Use a whole number, 0 or more.") from None
    count = len(digits) * copies
    base = np.tile(np.arange(len(digits)), copies)
    partner = random.integers(len(items), size=count)
    shifts = random.integers(SHIFTS, size=(count, 4))  # digit row, digit column, garment row, garment column
    images = np.zeros((count, CANVAS, CANVAS), dtype=np.uint8)
    for parts, choice, shift, origin in (
        (digits, base, shifts[:, :2], 0),
        (items, partner, shifts[:, 2:], CANVAS - SIDE - SHIFTS + 1),
    ):
        for row in range(SHIFTS):
            for column in range(SHIFTS):
                here = np.flatnonzero((shift[:, 0] == row) & (shift[:, 1] == column))
                top, left = origin + row, origin + column
                window = (here, slice(top, top + SIDE), slice(left, left + SIDE))
                images[window] = np.maximum(images[window], parts[choice[here]])
    return images, np.stack([digit_labels[base], item_labels[partner]], axis=1)


class MultiFashion(torch.utils.data.Dataset[Sample]):
    """Images with a digit and a garment, held as bytes, handed out as floats in [0, 1].

    Args:
        images: [N, 36, 36] uint8.
        labels: [N, 2], digit and garment, 0..9.
        name: What the set is called in tables and errors.

    Raises:
        DataError: If shapes, dtypes or labels do not fit.

    Attributes:
        images: [N, 36, 36] uint8.
        labels: [N, 2] int64.
        name: As given.
        sha256: Of images and labels.
        fingerprint: Its first 16 hex digits.
    """

    def __init__(self, images: Tensor | Bytes, labels: Tensor | NDArray[Any], *, name: str = "multifashion") -> None:
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels).long()
        self.name = name
        count = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.shape != (count, CANVAS, CANVAS):
            raise DataError(
                f"{name}: images should be uint8 [N, 36, 36], found {self.images.dtype} {list(self.images.shape)}."
            )
        if self.labels.shape != (count, 2):
            raise DataError(f"{name}: labels should be [{count}, 2] like the images, found {list(self.labels.shape)}.")
        least, most = (int(self.labels.min()), int(self.labels.max())) if count else (0, 0)
        if least < 0 or most > 9:
            raise DataError(f"{name}: labels should be 0..9, found {least}..{most}.")
        labels_as_bytes = self.labels.to(torch.uint8).numpy()
        self.sha256 = content_hash({"images": self.images.numpy(), "labels": labels_as_bytes})
        self.fingerprint = self.sha256[:16]
        self._there: dict[torch.device, MultiFashion] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_there": {}}

    def on(self, device: torch.device) -> "MultiFashion":
        """The same set on a device, copied there once: the full set takes 180 MB, and no batch waits for the CPU."""
        if device == self.images.device:
            return self
        if device not in self._there:
            there = copy.copy(self)
            there.images, there.labels = self.images.to(device), self.labels.to(device)
            self._there[device] = there
        return self._there[device]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        """One image [1, 36, 36] and its labels, {"digit": [], "fashion": []}."""
        digit, fashion = self.labels[i]
        return self.images[i].unsqueeze(0).float() / 255, {"digit": digit, "fashion": fashion}

    def batch(self, indices: Tensor) -> Sample:
        """Many at once.

        Args:
            indices: [B] int64.

        Returns:
            Images [B, 1, 36, 36] float32 in [0, 1], and {"digit": [B], "fashion": [B]} int64.
        """
        indices = indices.to(self.labels.device)
        labels = self.labels[indices]
        return self.images[indices].unsqueeze(1).float().div_(255), {"digit": labels[:, 0], "fashion": labels[:, 1]}

    def __repr__(self) -> str:
        return f"MultiFashion({self.name!r}, {len(self)} images, fingerprint={self.fingerprint!r})"


def _compose_splits(
    arrays: Mapping[str, Bytes], key: Callable[[str, str, str], str], *, seed: int, name: str
) -> tuple[MultiFashion, MultiFashion]:
    """Compose both splits, each from its own files and its own stream of random numbers."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise DataError(f"seed = {seed!r}: expected a whole number, 0 or more.")
    sets = []
    for stream, (split, suffix) in enumerate((("train", "train"), ("t10k", "test"))):
        parts = [arrays[key(s, split, kind)] for s in ("mnist", "fashion-mnist") for kind in ("images", "labels")]
        images, labels = compose(*parts, seed=(seed, stream))
        sets.append(MultiFashion(images, labels, name=f"{name}-{suffix}"))
    return sets[0], sets[1]


# The mini set. --------------------------------------------------------------------------------------------------------


def load_mini(seed: int = 0) -> tuple[MultiFashion, MultiFashion]:
    """The mini set: 12000 + 2000 images of the first 6000 + 1000 of MNIST and Fashion-MNIST; ships with the package.

    Args:
        seed: Of the composition.

    Returns:
        Training set and test set.

    Raises:
        DataError: If the file in the package is missing or damaged.

    Example:
        >>> train, test = load_mini()
        >>> len(train), len(test), train[0][0].shape
        (12000, 2000, torch.Size([1, 36, 36]))
    """
    resource = importlib.resources.files("reconmtl.problems") / "multifashion_mini.npz"
    try:
        with np.load(io.BytesIO(resource.read_bytes()), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{resource} cannot be read: {error}. Reinstall reconmtl.") from None
    found = content_hash(arrays)
    if found != MINI_SHA256:
        raise DataError(f"{resource} is damaged: content sha256 {found}, expected {MINI_SHA256}. Reinstall reconmtl.")
    return _compose_splits(
        arrays, lambda source, split, kind: f"{source}_{split}_{kind}", seed=seed, name="multifashion-mini"
    )


# The full set. --------------------------------------------------------------------------------------------------------


def _cached(cache: str | Path | None) -> tuple[Path, Path]:
    folder = (cache_folder() if cache is None else Path(cache)) / "multifashion"
    return folder / "multifashion.json", folder / "multifashion.safetensors"


def build_full(
    source_dir: str | Path,
    *,
    cache: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    checksums: Mapping[str, str] = idx.CHECKSUMS,
) -> Path:
    """Compose the full set (120000 + 20000 images) and keep it in the cache; needs no network.

    A set that is already there, whole and of the same seed, is kept; a damaged one is built anew.

    Args:
        source_dir: Holds `mnist/` and `fashion-mnist/` (or torchvision's folders); verified in any case.
        cache: Folder to keep it in; default `cache_folder()`.
        seed: Of the composition.
        overwrite: Replace a set of another seed.
        checksums: File name -> sha256, as for `idx.read`.

    Returns:
        The folder that holds the set.

    Raises:
        DataError: If source files are missing or wrong (all of them are named), or a set of another seed is there.
        RunError: If the cache cannot be written.
    """
    arrays = idx.read(source_dir, checksums=checksums)
    manifest, data = _cached(cache)
    if manifest.exists() and not overwrite:
        try:
            stored = _read_manifest(manifest)
            _load_splits(stored, data)
        except DataError:
            stored = {}
        if stored and (stored["seed"], stored["sources"]) != (seed, dict(checksums)):
            raise DataError(
                f"{manifest.parent} holds a set of seed {stored['seed']}, not {seed}, or of other source files. "
                "Say `--overwrite` (overwrite=True), or choose another cache folder."
            )
        if stored:
            return manifest.parent
    splits = _compose_splits(
        arrays,
        lambda source, split, kind: f"{source}/{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte",
        seed=seed,
        name="multifashion",
    )
    tensors = {}
    for split, name in zip(splits, ("train", "test"), strict=True):
        tensors[f"{name}.images"] = split.images
        tensors[f"{name}.labels"] = split.labels.to(torch.uint8)

    def write(temporary: Path) -> None:
        temporary.write_bytes(safetensors.torch.save(tensors))

    # The manifest says that the data are whole: it goes first and comes last.
    try:
        manifest.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"Cannot replace {manifest}: {error.strerror or error}.") from None
    write_bytes(data, write)
    write_json(
        manifest,
        {
            "format": FORMAT,
            "seed": seed,
            "sources": dict(checksums),
            "train": {"count": len(splits[0]), "sha256": splits[0].sha256},
            "test": {"count": len(splits[1]), "sha256": splits[1].sha256},
        },
    )
    return manifest.parent


def _read_manifest(path: Path) -> dict[str, Any]:
    stored = read_json(path, DataError)
    if (
        not isinstance(stored, dict)
        or stored.get("format") != FORMAT
        or not isinstance(stored.get("seed"), int)
        or not isinstance(stored.get("sources"), dict)
        or not all(isinstance(stored.get(split), dict) for split in ("train", "test"))
    ):
        raise DataError(f"{path} is not the description of a set: expected format {FORMAT!r} with its fields.")
    return stored


def _load_splits(stored: Mapping[str, Any], data: Path) -> tuple[MultiFashion, MultiFashion]:
    try:
        tensors = safetensors.torch.load_file(data)
        pairs = {name: (tensors[f"{name}.images"], tensors[f"{name}.labels"]) for name in ("train", "test")}
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise DataError(f"{data} cannot be read: {error}.") from None
    sets = []
    for name, (images, labels) in pairs.items():
        split = MultiFashion(images, labels, name=f"multifashion-{name}")
        found, expected = split.sha256, stored[name].get("sha256")
        if found != expected:
            raise DataError(f"{data} is damaged: sha256 of its {name} part is {found}, expected {expected}.")
        sets.append(split)
    return sets[0], sets[1]


def load_full(*, cache: str | Path | None = None) -> tuple[MultiFashion, MultiFashion]:
    """The full set that `build_full` has put into the cache, verified.

    Args:
        cache: Folder it is kept in; default `cache_folder()`.

    Returns:
        Training set (120000) and test set (20000).

    Raises:
        DataError: If it has not been built or is damaged; says how to build it.
    """
    manifest, data = _cached(cache)
    if not manifest.exists():
        raise DataError(f"The full Multi-Fashion+MNIST set is not in {manifest.parent}. {MISSING}")
    try:
        return _load_splits(_read_manifest(manifest), data)
    except DataError as error:
        raise DataError(f"{error} {MISSING}") from None


# The published file. --------------------------------------------------------------------------------------------------


def load_published(path: str | Path) -> tuple[MultiFashion, MultiFashion]:
    """Read `multi_fashion_and_mnist.pickle` without running anything that may hide in it.

    The file is a pickled tuple (training images, training labels, test images, test labels): images of 36 x 36 values
    0..255, one per first index; labels [N, 2], digit and garment.

    Args:
        path: The file.

    Returns:
        Training set and test set.

    Raises:
        DataError: If the file names anything but arrays of plain numbers, or does not hold what is described above.

    Reference: Lin et al., Pareto Multi-Task Learning, NeurIPS 2019, who published the file.
    """
    fields = ("training images", "training labels", "test images", "test labels")
    train_images, train_labels, test_images, test_labels = (
        _whole_numbers(array, 255 if "images" in field else 9, f"{path}: {field}")
        for field, array in zip(fields, load_arrays(path, fields), strict=True)
    )
    return (
        _published_split(train_images, train_labels, f"{path}: training", "multifashion-published-train"),
        _published_split(test_images, test_labels, f"{path}: test", "multifashion-published-test"),
    )


def _published_split(images: Bytes, labels: Bytes, source: str, name: str) -> MultiFashion:
    count = len(labels) if labels.ndim else 0
    if count == 0 or labels.shape != (count, 2):
        raise DataError(f"{source} labels should be [N, 2] with N > 0, found {list(labels.shape)}.")
    if images.size != count * CANVAS**2 or (images.ndim > 1 and len(images) != count):
        raise DataError(f"{source} images {list(images.shape)} are not {count} (as many as labels) of 36 x 36.")
    return MultiFashion(images.reshape(count, CANVAS, CANVAS), labels, name=name)


def _whole_numbers(array: NDArray[Any], largest: int, source: str) -> Bytes:
    """Convert to bytes, or raise unless every value is a whole number from 0 to `largest`."""
    if array.size and not (array.min() >= 0 and array.max() <= largest):  # NaN fails both
        raise DataError(f"{source}: values should be 0..{largest}, found {array.min()}..{array.max()}.")
    whole = array.astype(np.uint8, order="C")
    if array.dtype.kind == "f" and not np.array_equal(whole, array):
        raise DataError(f"{source}: values should be whole numbers 0..{largest}, found fractions.")
    return whole
