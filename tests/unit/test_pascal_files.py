"""PASCAL-Context in the layout of PASCAL_MT: what is read, ignored, refused, and what cropping and mirroring do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from reconmtl.boundaries import label_edges
from reconmtl.errors import DataError
from reconmtl.problems.dense_files import mirrored
from reconmtl.problems.pascal_files import PARTS, TRUSTED, PascalFolder, fitted, prepared, read_maps
from reconmtl.problems.rooms import CLASSES, draw
from reconmtl.problems.rooms_files import CONTEXT, VOC, write_pascal_folder

COUNTS = {"train": 6, "val": 4}
SIZE = (48, 64)
few = pytest.mark.filterwarnings("ignore:.*published are:UserWarning")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pascal") / "PASCAL_MT"
    write_pascal_folder(root, counts=COUNTS, size=SIZE)
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "PASCAL_MT")
    return tmp_path / "PASCAL_MT"


def test_lists_are_the_fields() -> None:
    assert len(set(TRUSTED)) == len(TRUSTED) == 170
    assert len(PARTS) == 24
    assert set(PARTS.values()) == set(range(1, 7))
    assert {158, 440, 427} <= set(TRUSTED)  # floor, wall, tvmonitor
    assert not {360, 187, 31, 45} & set(TRUSTED)  # sky, grass, boat, bus: nothing that stands in rooms


@few
def test_files_hold_what_was_drawn(written: Path) -> None:
    data = PascalFolder(written, "train", size=80)
    seen = {"people": 0, "nobody": 0}
    for i in range(6):
        room = draw(i, size=SIZE)
        image, targets = data[i]
        inside = (slice(None), slice(0, 48), slice(0, 64))
        colours = image[inside] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        colours += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        assert float((colours - torch.from_numpy(room.image / 255).float()).abs().mean()) < 0.05  # JPEG
        voc = np.array([VOC.get(n, 0) for n in CLASSES])[room.semantic]
        voc[room.semantic < 0] = 255
        assert np.array_equal(targets["semantic"][inside[1:]].numpy(), voc)
        assert np.array_equal(targets["parts"][inside[1:]].numpy(), room.parts)
        seen["nobody" if (room.parts == 255).all() else "people"] += 1
        assert np.array_equal(targets["saliency"][inside][0].numpy(), room.saliency)
        classes = np.where(room.semantic < 0, 431, np.array(CONTEXT)[room.semantic])
        trusted = np.isin(classes, TRUSTED)
        normal = targets["normal"][inside].numpy()
        assert (normal[:, ~trusted] == 0).all()
        measured = trusted & (room.normal != 0).any(0)
        assert np.abs(normal - room.normal)[:, measured].max() < 0.02  # eight bits
        assert np.array_equal(targets["edge"][inside][0].numpy(), label_edges(classes))
        for task, outside in (("semantic", 255), ("parts", 255), ("saliency", 255), ("edge", 255), ("normal", 0)):
            assert (targets[task][..., 48:, :] == outside).all()
            assert (targets[task][..., 64:] == outside).all()
    assert min(seen.values()) > 0


@few
def test_either_folder_of_the_labels_is_read(root: Path) -> None:
    before = PascalFolder(root, "val", size=64, tasks=["semantic"])[1][1]["semantic"]
    name = "2001_000001.png"
    (root / "semseg" / "pascal-context").mkdir()
    (root / "semseg" / "VOC12" / name).rename(root / "semseg" / "pascal-context" / name)
    assert torch.equal(PascalFolder(root, "val", size=64, tasks=["semantic"])[1][1]["semantic"], before)


@few
def test_scaling_cropping_and_mirroring_keep_maps_together(written: Path) -> None:
    data = PascalFolder(written, "train", size=40, augment=True)
    maps = read_maps({name: paths[0] for name, paths in data.files.items()})
    whole = prepared(maps, data.tasks, 1.0)
    big = prepared(maps, data.tasks, 2.0)
    assert big["semantic"].shape == (1, 96, 128)
    assert torch.equal(big["semantic"][:, ::2, ::2], whole["semantic"])
    assert torch.equal(big["normal"][:, 1::2, ::2], whole["normal"])
    ratio = float(big["edge"].sum() / whole["edge"].sum())
    assert 1.6 < ratio < 2.4  # lines stay lines: twice as long, not four times as many pixels
    cut = fitted(big, 40, corner=(30, 50))
    assert torch.equal(cut["semantic"], big["semantic"][:, 30:70, 50:90])
    once, twice = mirrored(cut), mirrored(mirrored(cut))
    assert all(torch.equal(x, twice[n]) for n, x in cut.items())
    assert torch.equal(once["normal"][0], -cut["normal"][0].flip(1))
    assert torch.equal(once["normal"][1:], cut["normal"][1:].flip(2))


@few
def test_training_samples_change_with_the_random_state_and_test_samples_do_not(written: Path) -> None:
    train, test = PascalFolder(written, "train", size=40, augment=True), PascalFolder(written, "val", size=64)
    torch.manual_seed(0)
    first = [train[0] for _ in range(6)]
    torch.manual_seed(0)
    assert all(torch.equal(image, train[0][0]) for image, _ in first)
    assert len({image.numpy().tobytes() for image, _ in first}) > 3
    assert all(x.shape[-2:] == (40, 40) for image, targets in first for x in (image, *targets.values()))
    assert torch.equal(test[0][0], test[0][0])


def damage(root: Path) -> dict[str, Callable[[], object]]:
    name = "2000_000000"

    def labels(value: int) -> None:
        Image.fromarray(np.full(SIZE, value, dtype=np.uint8)).save(root / "semseg" / "VOC12" / f"{name}.png")

    def small() -> None:
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(root / "sal_distill" / f"{name}.png")

    context = root / "pascal-context" / "trainval" / f"{name}.mat"
    return {
        "labels such as 21, expected 0 to 20": lambda: labels(21),
        r"size \[8, 8\], its image has \[48, 64\]": small,
        r"no MATLAB file \(version 5 to 7\) with LabelMap": lambda: context.write_bytes(b"nothing"),
        "LabelMap is float64": lambda: savemat(context, {"LabelMap": np.zeros(SIZE)}),
        "labels such as 460": lambda: savemat(context, {"LabelMap": np.full(SIZE, 460)}),
        "not as PASCAL-Part's": lambda: savemat(root / "human_parts" / f"{name}.mat", {"anno": np.zeros((2, 2))}),
        "cannot be decoded": lambda: (root / "normals_distill" / f"{name}.png").write_bytes(b"nothing"),
        "sal_distill: 1 of 6 files are missing, e.g. 2000_000003": (root / "sal_distill" / "2000_000003.png").unlink,
        "semseg/VOC12 or .*: 6 of 6": lambda: shutil.rmtree(root / "semseg"),
        "no file names, or twice": lambda: (root / "ImageSets" / "Context" / "train.txt").write_text("../a\n"),
        "cannot be read": (root / "ImageSets" / "Context" / "train.txt").unlink,
        "names no image": lambda: (root / "ImageSets" / "Context" / "train.txt").write_text(""),
    }


@few
@pytest.mark.parametrize("message", list(damage(Path())))
def test_damaged_folders_are_refused_by_name(message: str, root: Path) -> None:
    damage(root)[message]()
    with pytest.raises(DataError, match=message) as caught:
        PascalFolder(root, "train", size=64)
    assert "PASCAL_MT.tgz" in str(caught.value)


@few
def test_all_faults_are_listed_at_once_and_images_must_fit(root: Path) -> None:
    shutil.rmtree(root / "semseg")
    (root / "sal_distill" / "2000_000003.png").unlink()
    with pytest.raises(DataError, match=r"semseg(.|\n)*sal_distill: 1 of 6"):
        PascalFolder(root, "train")
    assert len(PascalFolder(root, "train", tasks=["edge"])) == 6  # what is not asked for need not be there
    with pytest.raises(DataError, match="do not fit into size = 48"):
        PascalFolder(root, "val", tasks=["edge"], size=48)
    with pytest.raises(DataError, match="expected one of"):
        PascalFolder(root, "test", tasks=["depth"], size=3)


def test_other_counts_than_the_published_ones_are_a_warning(written: Path) -> None:
    with pytest.warns(UserWarning, match="4 images, published are 5105"):
        PascalFolder(written, "val", tasks=["saliency"])
