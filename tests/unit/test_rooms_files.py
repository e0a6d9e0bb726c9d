"""Drawn rooms in published layouts: what the loaders read is what was drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reconmtl.errors import DataError
from reconmtl.problems import cityscapes, nyuv2
from reconmtl.problems.dense_files import DenseFolder
from reconmtl.problems.rooms import COARSE, draw
from reconmtl.problems.rooms_files import BASELINE, write_npy_folders

SIZE = (32, 48)
few = pytest.mark.filterwarnings("ignore:.*published are:UserWarning")


def folder(tmp_path: Path, name: str) -> Path:
    write_npy_folders(tmp_path / name, name, counts={"train": 2}, size=SIZE)
    return tmp_path / name


@few
def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    room = draw(1, size=SIZE)
    image, targets = DenseFolder(folder(tmp_path, "nyuv2"), "train", layout=nyuv2.LAYOUT)[1]
    assert torch.allclose(image, torch.from_numpy(room.image / 255).float())
    assert torch.equal(targets["semantic"], torch.from_numpy(room.semantic).long())
    assert torch.equal(targets["depth"][0], torch.from_numpy(room.depth))
    assert torch.equal(targets["normal"], torch.from_numpy(room.normal))
    data = DenseFolder(folder(tmp_path, "cityscapes"), "train", layout=cityscapes.LAYOUT, tasks=["depth", "semantic"])
    _, targets = data[1]
    assert list(targets) == ["depth", "semantic"]
    near = room.depth > 0
    assert np.allclose(targets["depth"][0].numpy()[near], BASELINE / room.depth[near])
    assert (targets["depth"][0].numpy()[~near] == 0).all()
    labels = targets["semantic"].numpy()
    assert np.array_equal(labels, np.where(room.semantic < 0, -1, np.array(COARSE)[room.semantic]))


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected one of"):
        write_npy_folders(tmp_path, "kitti", counts={"train": 1})
