"""Each data set from a folder in its published layout: its check, and a smoke run of the paper's preset."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commandline import Say, caller
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.problems.rooms_files import write_npy_folders, write_pascal_folder

pytestmark = pytest.mark.slow


def celeba(root: Path) -> None:
    """The official folders, with images of the published size."""
    (root / "Img" / "img_align_celeba").mkdir(parents=True)
    (root / "Anno").mkdir()
    (root / "Eval").mkdir()
    random = np.random.Generator(np.random.PCG64(0))
    names = [f"{i:06}.jpg" for i in range(1, 81)]
    for name in names:
        pixels = random.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "Img" / "img_align_celeba" / name)
    rows = [f"{n} {' '.join(str(2 * v - 1) for v in random.integers(0, 2, 40))}" for n in names]
    text = "\n".join([str(len(names)), " ".join(CELEBA_ATTRIBUTES), *rows])
    (root / "Anno" / "list_attr_celeba.txt").write_text(text + "\n")
    parts = "\n".join(f"{n} {0 if i < 64 else 1 if i < 70 else 2}" for i, n in enumerate(names))
    (root / "Eval" / "list_eval_partition.txt").write_text(parts + "\n")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "cityscapes": lambda root: write_npy_folders(root, "cityscapes", counts={"train": 40, "val": 6}, size=(32, 64)),
    "nyuv2": lambda root: write_npy_folders(root, "nyuv2", counts={"train": 10, "val": 4}, size=(32, 64)),
    "pascal_context": lambda root: write_pascal_folder(root, counts={"train": 14, "val": 4}, size=(96, 128)),
    "celeba": celeba,
}


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    return caller(tmp_path, monkeypatch, capsys)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore:.*published are:UserWarning")
def test_check_and_the_papers_preset(name: str, tmp_path: Path, say: Say) -> None:
    root = tmp_path / "data"
    FOLDERS[name](root)
    where = ["--preset", "paper", "--root", str(root)]
    width = ["--width", "4"]  # the networks' full sizes have tests of their own, and would take minutes per method here
    checked = say("check", name, *where, *width)
    assert checked.code == 0, checked.err
    assert f"{name}: 0 faults" in checked.out
    out = tmp_path / "out"
    methods = ["--methods", "single", "joint", "recon"]
    ran = say("run", name, *where, *width, *methods, "--fast-dev-run", "--out", str(out), "--jobs", "1")
    assert ran.code == 0, ran.err
    assert "joint w/ Recon" in (out / "table.md").read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("network", "tasks"),
    [
        ("segnet", ["semantic", "depth"]),
        ("mtan", ["semantic", "depth", "normal"]),
        ("mobilenet", ["semantic", "depth", "normal", "parts", "saliency"]),
    ],
)
def test_drawn_rooms_with_any_network_and_any_tasks(network: str, tasks: list[str], tmp_path: Path, say: Say) -> None:
    out = tmp_path / "out"
    options = ["--network", network, "--tasks", *tasks, "--fast-dev-run", "--methods", "joint", "recon"]
    ran = say("run", "scenes", *options, "--out", str(out), "--jobs", "1")
    assert ran.code == 0, ran.err
    plan = json.loads((out / "plan.json").read_text())
    assert plan["tasks"] == tasks
    table = (out / "table.md").read_text()
    assert "joint w/ Recon" in table
    assert all(task in table for task in tasks)
