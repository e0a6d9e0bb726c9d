"""CelebA: three layouts of one data set, a cache that survives interruption, faults by name, forty tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from celeba import write
from reconmtl.errors import DataError
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.problems import celeba_files
from reconmtl.problems.celeba_files import generated, load_split, read_listing

few = pytest.mark.filterwarnings("ignore:CelebA, .*published are:UserWarning")


@few
@pytest.mark.parametrize("layout", ["official", "torchvision", "kaggle"])
def test_three_layouts_hold_the_same(layout: str, tmp_path: Path) -> None:
    labels = write(tmp_path / "data", layout)
    tasks = ("Young", "Bald")
    data = load_split(tmp_path / "data", "test", tasks=tasks, cache=tmp_path / "cache")
    assert len(data) == 4
    image, targets = data[1]
    assert list(targets) == list(tasks)
    for task, value in targets.items():
        assert int(value) == labels[9, CELEBA_ATTRIBUTES.index(task)]
    pixels = (image * data.std + data.mean) * 255
    assert torch.allclose(pixels[:, :28], torch.tensor(255.0 - 180), atol=3)
    assert torch.allclose(pixels[:, 36:], torch.tensor(180.0), atol=3)
    assert torch.equal(data[-3][0], image)
    with pytest.raises(IndexError):
        data[4]


@few
def test_an_interrupted_cache_is_continued_and_a_finished_one_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", "official")
    monkeypatch.setattr(celeba_files, "CHUNK", 2)
    seen: list[str] = []
    decode = celeba_files._decode

    def interrupted(path: Path) -> np.ndarray:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(path.name)
        return decode(path)

    monkeypatch.setattr(celeba_files, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    seen.clear()
    data = load_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    assert seen == ["000005.jpg", "000006.jpg"]
    seen.clear()
    again = load_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    assert not seen
    whole = np.stack([decode(tmp_path / "data/Img/img_align_celeba" / f"{i:06d}.jpg") for i in range(1, 7)])
    assert np.array_equal(again.images, whole) and np.array_equal(data.images, whole)


@few
@pytest.mark.parametrize("damage", ["bytes", "length", "notes"])
def test_a_damaged_cache_is_refused_and_says_what_to_delete(damage: str, tmp_path: Path) -> None:
    write(tmp_path / "data", "official")
    load_split(tmp_path / "data", "train", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    path = folder / "images.npy"
    content = path.read_bytes()
    if damage == "bytes":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 255]) + content[5001:])
    elif damage == "length":
        path.write_bytes(content[:-1])
    else:
        notes = json.loads((folder / "notes.json").read_text())
        (folder / "notes.json").write_text(json.dumps(notes | {"shape": [10**12, 3, 64, 64]}))
    with pytest.raises(DataError, match=r"delete the folder .*celeba-train"):
        load_split(tmp_path / "data", "train", cache=tmp_path / "cache")


def test_what_is_missing_or_odd_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list_attr_celeba(.|\n)*list_eval_partition(.|\n)*images(.|\n)*mmlab"):
        read_listing(tmp_path)
    write(tmp_path, "official")
    attributes, partition = tmp_path / "Anno/list_attr_celeba.txt", tmp_path / "Eval/list_eval_partition.txt"
    (tmp_path / "Img/img_align_celeba/000003.jpg").unlink()
    text = partition.read_text()
    partition.write_text(text.replace("000012.jpg 2\n", ""))
    with pytest.raises(
        DataError, match=r"12 images, list_eval_partition.txt 11(.|\n)*1 images are missing, e.g. 000003"
    ):
        read_listing(tmp_path)
    for line, message in (("000001.jpg 7", "line 1: expected a file name and 0, 1 or 2"), ("../../x 0", "line 1")):
        partition.write_text(f"{line}\n{text}")
        with pytest.raises(DataError, match=message):
            read_listing(tmp_path)
    partition.write_text(text)
    content = attributes.read_text()
    attributes.write_text(content.replace("Bald", "Balt"))
    with pytest.raises(DataError, match="40 attributes in their published order"):
        read_listing(tmp_path)
    attributes.write_text(content.replace("000004.jpg  ", "000004.jpg 3 "))
    with pytest.raises(DataError, match="line 6: expected a file name and 40 times"):
        read_listing(tmp_path)
    attributes.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_listing(tmp_path)


@few
def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    write(tmp_path / "data", "official")
    (tmp_path / "data/Img/img_align_celeba/000002.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000002\.jpg cannot be decoded"):
        load_split(tmp_path / "data", "train", cache=tmp_path / "cache")


def test_other_counts_than_the_published_ones_are_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "data", "official")
    with pytest.warns(UserWarning, match="4 images, published are 19962"):
        load_split(tmp_path / "data", "test", cache=tmp_path / "cache")


def test_generated_images_follow_from_their_seed_and_show_their_attributes() -> None:
    data = generated(300, seed=0)
    assert np.array_equal(generated(300, seed=0).images, data.images)
    assert not np.array_equal(generated(300, seed=1).images, data.images)
    together = np.asarray(np.corrcoef(data.labels.T))
    assert together[0, 1] > 0.2 > abs(together[0, 39])
    flat = data.images.reshape(300, -1).astype(np.float64)
    for column in (0, 17, 39):
        weights = flat[data.labels[:, column] == 1].mean(0) - flat[data.labels[:, column] == 0].mean(0)
        score = (flat - flat.mean(0)) @ weights
        assert np.corrcoef(score, data.labels[:, column])[0, 1] > 0.5
