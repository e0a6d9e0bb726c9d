"""CityScapes and NYUv2 in MTAN's files: what is read, what is refused, and what enlarging and mirroring do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reconmtl.errors import DataError
from reconmtl.problems import cityscapes, nyuv2
from reconmtl.problems.dense_files import DenseFolder, Layout, enlarged, mirrored
from reconmtl.problems.rooms import draw
from reconmtl.problems.rooms_files import write_npy_folders

COUNTS = {"train": 8, "val": 3}
SIZE = (32, 48)
few = pytest.mark.filterwarnings("ignore:.*published are:UserWarning")


def folder(tmp_path: Path, name: str) -> Path:
    write_npy_folders(tmp_path / name, name, counts=COUNTS, size=SIZE)
    return tmp_path / name


@few
def test_both_names_of_the_labels_are_read(tmp_path: Path) -> None:
    root = folder(tmp_path, "cityscapes")
    before = DenseFolder(root, "val", layout=cityscapes.LAYOUT)[0][1]["semantic"]
    (root / "val" / "label_7").rename(root / "val" / "label")
    assert torch.equal(DenseFolder(root, "val", layout=cityscapes.LAYOUT)[0][1]["semantic"], before)


def scene(name: str) -> tuple[dict[str, Tensor], Layout]:
    layout = {"cityscapes": cityscapes.LAYOUT, "nyuv2": nyuv2.LAYOUT}[name]
    room = draw(3, size=(60, 90))
    maps = {
        "image": torch.from_numpy(room.image / 255).float(),
        "semantic": torch.from_numpy(room.semantic).float()[None],
        "depth": torch.from_numpy(room.depth)[None],
    }
    if name == "nyuv2":
        maps["normal"] = torch.from_numpy(room.normal)
    return maps, layout


@pytest.mark.parametrize("scale", [1.0, 1.2, 1.5])
def test_enlarging_keeps_maps_together_and_distances_right(scale: float) -> None:
    """A point seen `scale` times as large is `scale` times as near; its disparity is that much larger."""
    for name in ("cityscapes", "nyuv2"):
        maps, layout = scene(name)
        torch.manual_seed(1)
        top, left = (int(torch.randint(s - int(s / scale) + 1, ())) for s in (60, 90))
        torch.manual_seed(1)
        big = enlarged(maps, layout.kinds, scale, paper=False)
        rows, columns = (torch.arange(s) * int(s / scale) // s for s in (60, 90))
        crop = maps["semantic"][0, top:, left:][rows][:, columns]
        assert (big["semantic"][0] == crop).float().mean() > 0.97  # nearest pixels, up to rounding at borders
        source = maps["depth"][0, top:, left:][rows][:, columns]
        factor = scale if name == "cityscapes" else 1 / scale
        assert ((big["depth"][0] - source * factor).abs() < 1e-5).float().mean() > 0.97
        torch.manual_seed(1)
        published = enlarged(maps, layout.kinds, scale, paper=True)
        assert ((published["depth"][0] - source / scale).abs() < 1e-5).float().mean() > 0.97
        if name == "nyuv2":
            length = big["normal"].norm(dim=0)
            assert torch.allclose(length[length > 0], torch.ones(()), atol=1e-5)
            if scale > 1:
                assert float(published["normal"].norm(dim=0).max()) <= 1 + 1e-5
                assert ((published["normal"].norm(dim=0) < 0.99) & (length > 0.99)).any()


def test_mirroring_twice_changes_nothing_and_once_mirrors_normals() -> None:
    maps, _ = scene("nyuv2")
    once = mirrored(maps)
    assert all(torch.equal(x, maps[n]) for n, x in mirrored(once).items())
    assert torch.equal(once["depth"][..., 0], maps["depth"][..., -1])
    assert torch.equal(once["normal"][0], -maps["normal"][0].flip(1))
    assert torch.equal(once["normal"][2], maps["normal"][2].flip(1))


@few
def test_training_samples_change_with_the_random_state_and_test_samples_do_not(tmp_path: Path) -> None:
    root = folder(tmp_path, "nyuv2")
    data = DenseFolder(root, "train", layout=nyuv2.LAYOUT, augment=True)
    torch.manual_seed(0)
    first = [data[0][0] for _ in range(8)]
    torch.manual_seed(0)
    assert all(torch.equal(a, data[0][0]) for a in first)
    assert len({x.numpy().tobytes() for x in first}) > 2
    test = DenseFolder(root, "val", layout=nyuv2.LAYOUT)
    assert torch.equal(test[0][0], test[0][0])


def damage(root: Path) -> dict[str, Callable[[], object]]:
    depth, train = root / "train" / "depth", root / "train"

    def save(path: Path, array: object) -> None:
        np.save(path, np.asarray(array), allow_pickle=True)

    def save_all(name: str, array: object) -> None:
        for path in (train / name).iterdir():
            save(path, array)

    def nan() -> None:
        array = np.load(depth / "0.npy")
        array[0, 0] = np.nan
        save(depth / "0.npy", array)

    return {
        r"depth/1\.npy: shape \[5, 5, 1\]": lambda: save(depth / "1.npy", np.zeros((5, 5, 1), np.float32)),
        "2.npy is missing": (depth / "2.npy").unlink,
        "different numbers": (depth / "7.npy").unlink,
        "labels such as 13": lambda: save(train / "label" / "0.npy", np.full(SIZE, 13.0)),
        "labels such as 0.5": lambda: save(train / "label" / "7.npy", np.full(SIZE, 0.5)),
        "NaN": nan,
        "no .npy file of numbers": lambda: (depth / "1.npy").write_bytes(b"no array"),
        "of numbers": lambda: save(depth / "1.npy", np.array([{"a": 1}], dtype=object)),
        "1.npy is no": lambda: (depth / "1.npy").write_bytes((depth / "1.npy").read_bytes()[:-8]),
        r"shape \[32, 48\], expected \[H, W, 3\]": lambda: save_all("image", np.zeros(SIZE)),
        "heights and widths": lambda: save_all("normal", np.zeros((8, 8, 3))),
        "no folder .*normal": lambda: (train / "normal").rename(root / "elsewhere"),
    }


@few
@pytest.mark.parametrize("message", list(damage(Path())))
def test_damaged_folders_are_refused_by_name(message: str, tmp_path: Path) -> None:
    root = folder(tmp_path, "nyuv2")
    damage(root)[message]()
    with pytest.raises(DataError, match=message) as caught:
        DenseFolder(root, "train", layout=nyuv2.LAYOUT)
    assert "github.com/lorenmt/mtan" in str(caught.value)


@few
def test_all_faults_are_listed_at_once_and_later_ones_when_they_are_read(tmp_path: Path) -> None:
    root = folder(tmp_path, "nyuv2")
    for message in ("2.npy is missing", "labels such as 13", "no folder .*normal"):
        damage(root)[message]()
    with pytest.raises(DataError, match=r"labels such as 13(.|\n)*2\.npy is missing(.|\n)*no folder"):
        DenseFolder(root, "train", layout=nyuv2.LAYOUT)
    root = folder(tmp_path / "other", "nyuv2")
    np.save(root / "train" / "label" / "1.npy", np.full(SIZE, 77.0))
    data = DenseFolder(root, "train", layout=nyuv2.LAYOUT)
    with pytest.raises(DataError, match=r"label/1\.npy: labels such as 77"):
        data[1]
    with pytest.raises(IndexError):
        data[8]


def test_other_counts_than_the_published_ones_are_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="8 samples, published are 795"):
        DenseFolder(folder(tmp_path, "nyuv2"), "train", layout=nyuv2.LAYOUT)
