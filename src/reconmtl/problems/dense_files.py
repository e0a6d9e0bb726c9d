"""Dense data sets in the .npy layout of MTAN: {root}/{train,val}/{image,label,depth,normal}/{i}.npy.

The published pipeline enlarges crops and mirrors images while training. It divides the depth map by the enlargement,
which is right for a depth but not for a disparity (what CityScapes' "depth" is), and it leaves interpolated normals
shorter than one. Here both are right; `paper=True` does as published.

Reference: Liu et al., MTAN, CVPR 2019 (https://github.com/lorenmt/mtan); Shi et al., Recon, ICLR 2023, B.2 and B.3.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.errors import DataError, ProblemError, nearest
from reconmtl.losses import cross_entropy, depth_l1, normal_cosine
from reconmtl.problem import Metric, Problem, Recipe, Task

SCALES = (1.0, 1.2, 1.5)
"""Enlargements that are drawn from, each as likely as the others."""
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Kind:
    """What the files of one task look like.

    Attributes:
        folders: Names that its folder may have; the first that exists is read.
        channels: Last axis of its arrays; 0: none, [H, W].
        classes: Number of classes of labels, else 0.
        disparity: Whether larger values mean nearer, so that enlarging multiplies instead of dividing.
    """

    folders: tuple[str, ...]
    channels: int
    classes: int = 0
    disparity: bool = False


@dataclass(frozen=True)
class Layout:
    """What a data set's folder holds.

    Attributes:
        name: Of the data set.
        kinds: {"image" or task: Kind}.
        counts: Published number of samples per split.
        source: Where to get it.
    """

    name: str
    kinds: Mapping[str, Kind]
    counts: Mapping[str, int]
    source: str


class DenseFolder:
    """One split of a data set on disk; items are (image [3, H, W], {task: target}).

    Targets: labels [H, W] int64 (-1 ignored), depth [1, H, W] (0 unknown), normal [3, H, W] (zeros unknown).

    Args:
        root: The folder with train/ and val/.
        split: "train" or "val".
        layout: What it should hold.
        tasks: Whose targets are wanted; None: all.
        augment: Enlarge and mirror at random, from PyTorch's global random state.
        paper: Enlarge as published, see the top of the file.

    Raises:
        DataError: If anything is missing or odd; all of it is listed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        layout: Layout,
        tasks: Sequence[str] | None = None,
        augment: bool = False,
        paper: bool = False,
    ) -> None:
        known = [k for k in layout.kinds if k != "image"]
        self.tasks = tuple(known if tasks is None else tasks)
        self.layout, self.augment, self.paper = layout, augment, paper
        self.root, self.split = Path(root), split
        self.folders, self.n = check_split(self.root, split, layout, ("image", *self.tasks))
        self.fingerprint = f"{layout.name}-{split}-{self.n}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} samples, no number {index}.")
        maps = {name: self._read(name, index % self.n) for name in ("image", *self.tasks)}
        if self.augment:
            maps = enlarged(maps, self.layout.kinds, _draw_scale(), paper=self.paper)
            if bool(torch.rand(()) < 0.5):
                maps = mirrored(maps)
        image = maps.pop("image")
        return image, {task: (x[0].long() if self.layout.kinds[task].classes else x) for task, x in maps.items()}

    def _read(self, name: str, index: int) -> Tensor:
        """One array as float32 [C, H, W]."""
        path = self.folders[name] / f"{index}.npy"
        array = read_npy(path)
        faults = array_faults(array, self.layout.kinds[name])
        if faults:
            raise DataError(f"{path}: {'; '.join(faults)}. Get the file again ({self.layout.source}).")
        tensor = torch.from_numpy(array.astype(np.float32))
        return tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor[None]


def make_problem(
    layout: Layout,
    *,
    root: str | Path | None,
    network: str,
    networks: Mapping[str, Callable[..., nn.Module]],
    width: int,
    tasks: Sequence[str],
    known: Mapping[str, Callable[[], Task]],
    recipe: Recipe,
    paper: bool,
) -> Problem:
    """A problem on one of these data sets; single tasks are learned by SegNets, as the paper's rows are.

    Args:
        layout: Of the data set.
        root: Its folder.
        network: Which of `networks`.
        networks: {name: function (width, tasks) -> network}, "segnet" among them.
        width: Channels of the network's first stage.
        tasks: Which of `known`.
        known: {name: function without arguments that makes the task}.
        recipe: How to train.
        paper: Augment as the published code does, see the top of the file.

    Raises:
        DataError: If the folder is missing or odd; all faults are listed.
        ProblemError: If the network or a task is unknown.
        MissingExtraError: If torchmetrics is not installed.
    """
    faults = [] if network in networks else [f"Unknown network {network!r}. {nearest(network, networks)}"]
    faults += [f"{layout.name} has no task {t!r}. {nearest(t, known)}" for t in tasks if t not in known]
    if faults:
        raise ProblemError(" ".join(faults))
    folder = located(root, layout)
    return Problem(
        model=partial(networks[network], width=width, tasks=tuple(tasks)),
        single=lambda task: networks["segnet"](width=width, tasks=[task]),
        tasks=[known[t]() for t in tasks],
        train=DenseFolder(folder, "train", layout=layout, tasks=tasks, augment=True, paper=paper),
        test=DenseFolder(folder, "val", layout=layout, tasks=tasks),
        recipe=recipe,
        name=layout.name,
    )


def located(root: str | Path | None, layout: Layout) -> Path:
    """The folder that was given, or what to do without one.

    Raises:
        DataError: If none was given.
    """
    if root is None:
        raise DataError(f"{layout.name} needs its folder: --root DIR, with train/ and val/ in it. Get {layout.source}.")
    return Path(root).expanduser()


def segmentation(classes: int) -> Task:
    """The task `semantic` with the paper's loss and metrics."""
    from reconmtl import metrics as m

    measures = [
        Metric("mIoU", partial(m.MeanIoU, classes), best="max"),
        Metric("pix acc", partial(m.PixelAccuracy, classes), best="max"),
    ]
    return Task("semantic", loss=cross_entropy, metrics=measures)


def depth() -> Task:
    """The task `depth` with the paper's loss and metrics, which are averaged over images."""
    from reconmtl import metrics as m

    measures = [
        Metric("abs err", partial(m.DepthError, "abs"), best="min"),
        Metric("rel err", partial(m.DepthError, "rel"), best="min"),
    ]
    return Task("depth", loss=depth_l1, metrics=measures)


def normals(*, paper: bool) -> Task:
    """The task `normal` with the paper's loss and metrics, which are averaged over images."""
    from reconmtl import metrics as m

    kinds = (("mean", "mean"), ("median", "median"), ("11.25", 11.25), ("22.5", 22.5), ("30", 30.0))
    measures = [
        Metric(name, partial(m.NormalError, kind, paper=paper), best="min" if isinstance(kind, str) else "max")  # type: ignore[arg-type]
        for name, kind in kinds
    ]
    return Task("normal", loss=partial(normal_cosine, paper=paper), metrics=measures)


def check_split(root: Path, split: str, layout: Layout, names: Sequence[str]) -> tuple[dict[str, Path], int]:
    """Look at a folder before anything is read from it: every file's header, and the content of the first and last.

    Returns:
        The folder of the images and of each task, and the number of samples.

    Raises:
        DataError: If anything is missing or odd; all of it is listed.
    """
    unknown = [n for n in names if n not in layout.kinds]
    if unknown or split not in SPLITS:
        raise DataError(f"{layout.name} has {SPLITS} and {list(layout.kinds)}, not {[split, *unknown]}.")
    faults, folders, found = [], {}, {}
    for name in names:
        kind = layout.kinds[name]
        folder = next((root / split / f for f in kind.folders if (root / split / f).is_dir()), None)
        if folder is None:
            faults.append(
                f"no folder {root / split / kind.folders[0]}" + "".join(f" (or {f})" for f in kind.folders[1:])
            )
            continue
        folders[name] = folder
        numbers = sorted(int(p.stem) for p in folder.glob("*.npy") if p.stem.isdigit())
        found[name] = len(numbers)
        if numbers != list(range(len(numbers))) or not numbers:
            gap = next((i for i, n in enumerate(numbers) if i != n), len(numbers))
            faults.append(f"{folder}: expected 0.npy, 1.npy, ... without gaps, {gap}.npy is missing")
            continue
        faults += _header_faults(folder, len(numbers), kind)
        for i in {0, len(numbers) - 1}:
            try:
                faults += [f"{folder / f'{i}.npy'}: {f}" for f in array_faults(read_npy(folder / f"{i}.npy"), kind)]
            except DataError as error:
                faults.append(str(error))
    if len(set(found.values())) > 1:
        faults.append(f"different numbers of files: {found}")
    if not faults:
        faults += _size_faults(folders)
    if faults:
        raise DataError(
            f"{layout.name} cannot be read from {root}:\n- " + "\n- ".join(faults) + f"\nIt is to be had here: "
            f"{layout.source}"
        )
    count = next(iter(found.values()))
    if count != layout.counts[split]:
        warnings.warn(
            f"{layout.name}, {split}: {count} samples, published are {layout.counts[split]}; results will differ.",
            stacklevel=2,
        )
    return folders, count


def _header_faults(folder: Path, count: int, kind: Kind) -> list[str]:
    """Files whose header is damaged, or whose shape is not the first one's."""
    first: tuple[int, ...] | None = None
    for i in range(count):
        path = folder / f"{i}.npy"
        try:
            shape = header(path)
        except DataError as error:
            return [str(error)]
        first = first or shape
        wanted = 3 if kind.channels else 2
        if shape != first or len(shape) != wanted or (kind.channels and shape[-1] != kind.channels):
            like = f"[H, W, {kind.channels}]" if kind.channels else "[H, W]"
            return [f"{path}: shape {list(shape)}, expected {like}, the same for all (0.npy has {list(first)})"]
    return []


def _size_faults(folders: Mapping[str, Path]) -> list[str]:
    sizes = {name: header(folder / "0.npy")[:2] for name, folder in folders.items()}
    return [f"heights and widths differ: {sizes}"] if len(set(sizes.values())) > 1 else []


def header(path: Path) -> tuple[int, ...]:
    """The shape that a .npy file says it has; its data is not read.

    Raises:
        DataError: If the file is no .npy file, holds objects, or is shorter than its header says.
    """
    return tuple(_mapped(path).shape)


def _mapped(path: Path) -> NDArray[Any]:
    """The array, mapped to memory, so that no memory is taken for more than the file holds."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, which a damaged one can fail in any way
        raise DataError(f"{path} is no .npy file of numbers: {type(error).__name__}: {error!s:.200}") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is no .npy file of numbers.")
    return array


def read_npy(path: Path) -> NDArray[Any]:
    """Read an array of numbers.

    Raises:
        DataError: If the file is no .npy file, holds objects, or is shorter than its header says.
    """
    return np.array(_mapped(path))


def array_faults(array: NDArray[Any], kind: Kind) -> list[str]:
    """What is wrong with one array's content."""
    if array.dtype.kind not in "fiub":
        return [f"dtype {array.dtype}, expected numbers"]
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            single = array.astype(np.float32, copy=False)  # what is trained on
        if not np.isfinite(single).all():
            return ["NaN or infinite values"]
    if kind.classes:
        odd = (array != np.floor(array)) | (array < -1) | (array >= kind.classes)
        if odd.any():
            return [f"labels such as {array[odd][0]}, expected -1 (ignored) to {kind.classes - 1}"]
    return []


def _draw_scale() -> float:
    return SCALES[int(torch.randint(len(SCALES), ()))]


def enlarged(maps: Mapping[str, Tensor], kinds: Mapping[str, Kind], scale: float, *, paper: bool) -> dict[str, Tensor]:
    """A random crop of all maps, enlarged to the whole size.

    Args:
        maps: [C, H, W] each.
        kinds: What they are.
        scale: At least 1; the crop's sides are the whole ones divided by it.
        paper: As published: a disparity is divided, not multiplied, by the scale, and normals keep the length that
            interpolation gives them.
    """
    height, width = next(iter(maps.values())).shape[-2:]
    rows, columns = int(height / scale), int(width / scale)
    top = int(torch.randint(height - rows + 1, ()))
    left = int(torch.randint(width - columns + 1, ()))
    found = {}
    for name, x in maps.items():
        part = x[None, :, top : top + rows, left : left + columns]
        if name == "image" or name == "normal":
            big = F.interpolate(part, (height, width), mode="bilinear", align_corners=True)
        else:
            big = F.interpolate(part, (height, width), mode="nearest")
        if name == "normal" and not paper:
            big = directions(big)
        if name == "depth":
            big = big * scale if kinds[name].disparity and not paper else big / scale
        found[name] = big[0]
    return found


def directions(vectors: Tensor) -> Tensor:
    """Vectors [N, 3, H, W] at length one; zeros stay zeros. Several times as fast as `F.normalize` along this axis."""
    return vectors / vectors.square().sum(1, keepdim=True).sqrt_().clamp_(min=1e-12)


def mirrored(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All maps [C, H, W] with left and right exchanged; the first component of normals changes its sign."""
    found = {name: x.flip(2) for name, x in maps.items()}
    if "normal" in found:
        found["normal"] = found["normal"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return found
