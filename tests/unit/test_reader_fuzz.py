"""Files come from strangers: whatever is in them, a reader succeeds or raises one of our errors that names the file.

Two kinds of damage: bytes (flipped, cut, doubled, numbers made huge) and, where a file is JSON, values of any other
shape. The slow test does the bulk in a process whose memory is bounded, so that what a file claims is not allocated.
"""

import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import reconmtl as rm
from reconmtl import checkpoints
from reconmtl.configuration import read_config
from reconmtl.conflicts import ConflictLog
from reconmtl.counts import Counts
from reconmtl.errors import ReconError
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.plan import Plan
from reconmtl.problems import celeba_files, idx, multifashion_data, nyuv2, pascal_files
from reconmtl.problems.celeba_files import read_listing
from reconmtl.problems.dense_files import DenseFolder
from reconmtl.problems.pascal_files import PascalFolder
from reconmtl.problems.rooms_files import write_npy_folders, write_pascal_folder
from reconmtl.reporting.material import _curve
from reconmtl.runs import Run
from reconmtl.settings import Settings, SweepSettings
from reconmtl.splitting import saved_plan
from reconmtl.splitting.adapted import EXTRA

MANY = 30_000
"""Cases of the slow test, over all readers."""
FEW = 40
"""Cases per reader by default."""
MEMORY = 2 * 2**30
"""Bytes that the slow test's process may take beyond what it has when it begins."""

PLAN = Plan(tasks=["a", "b"], layers={"fc": [["a"], ["b"]]}, chosen={"by": "conflict", "k": 1, "scores": [3, 1]})


@dataclass(frozen=True)
class Reader:
    """Something that reads files of a folder."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    names_file: bool = True


def _log(folder: Path, *, counted: bool = False) -> None:
    grams = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    names = {"tasks": ["a", "b"], "layers": ["fc", "out"], "sizes": {"fc": 6, "out": 2}}
    log = ConflictLog(grams, types={"fc": "Linear", "out": "Linear"}, **names)  # type: ignore[arg-type]
    (log.counted() if counted else log).save(folder)


def _run(folder: Path) -> None:
    from reconmtl.files import append_json, write_json

    log = folder / "log"
    _log(log)
    run = Run(
        method="joint",
        label="joint w/ Recon",
        seed=3,
        metrics={"a": {"acc": 80.5}, "b": {"mse": 0.25}},
        directions={"a": {"acc": "max"}, "b": {"mse": "min"}},
        parameters=2**19,
        seconds=1.5,
        fingerprint="0123",
        network="Net",
        path=folder,
    )
    write_json(folder / "config.json", {"problem": "p", "norm_stats": "per-task", "recipe": {"lr": 0.1}})
    PLAN.save(folder / "plan.json")
    run.save()
    for epoch in (1, 2):
        append_json(folder / "metrics.jsonl", {"epoch": epoch, "loss": 1.0, "test": {"a": {"acc": 1.5}}})


def _read_run(folder: Path) -> object:
    run = Run.load(folder)
    return run, run.megabytes, list(_curve(folder))


def _checkpoint(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {
        "epoch": 2,
        "optimizer": {"state": {0: {"momentum": torch.ones(2)}}, "groups": [{"lr": 0.1}]},
        "x": (1, None),
    }
    checkpoints.save_checkpoint(folder / "last.ckpt", model, {"seed": 1}, training=state)


def _split_state(folder: Path) -> None:
    model = rm.split(nn.Sequential(nn.Linear(2, 2)), Plan(tasks=["a", "b"], layers=["0"]))
    (folder / "state").write_bytes(bytes(model.state_dict()[EXTRA].to(torch.uint8).tolist()))


def _read_split_state(folder: Path) -> object:
    content = torch.tensor(list((folder / "state").read_bytes()), dtype=torch.uint8)
    return saved_plan({EXTRA: content})


def _idx(folder: Path) -> None:
    (folder / "images").write_bytes(bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (3, 2, 2)) + bytes(12))


def _read_idx(folder: Path) -> object:
    return idx.parse((folder / "images").read_bytes(), source=str(folder / "images"))


def _cached(folder: Path) -> None:
    manifest, data = multifashion_data._cached(folder)
    data.parent.mkdir(parents=True, exist_ok=True)
    content = {f"{s}.{w}": torch.zeros(shape, dtype=torch.uint8) for s in ("train", "test")
               for w, shape in (("images", (2, 36, 36)), ("labels", (2, 2)))}  # fmt: skip
    save_file(content, data)
    parts: dict[str, Any] = {"seed": 0, "sources": {}, "format": multifashion_data.FORMAT}
    parts |= {s: {"sha256": "0" * 64} for s in ("train", "test")}
    manifest.write_text(json.dumps(parts))


def _config(folder: Path) -> None:
    (folder / "config.yaml").write_text("problem: planted\nepochs: 3\nseeds: [0, 1]\nlr: 0.1\nquiet: true\n")


def _read_config(folder: Path) -> object:
    return [read_config(folder / "config.yaml", kind) for kind in (Settings, SweepSettings)]


# Data sets. -----------------------------------------------------------------------------------------------------------


def _published(folder: Path) -> None:
    images, labels = np.arange(2 * 36 * 36, dtype=np.uint8).reshape(2, 36, 36), np.array([[1, 2], [3, 4]])
    content = (images.astype(np.float64), labels, np.asfortranarray(images), labels.astype(">i2"))
    with (folder / "published.pickle").open("wb") as file:
        pickle.dump(content, file, protocol=2)


def _celeba_lists(folder: Path, *, kaggle: bool = False) -> None:
    names = [f"{i:06d}.jpg" for i in range(1, 4)]
    (folder / "img_align_celeba").mkdir(parents=True)
    for name in names:
        (folder / "img_align_celeba" / name).touch()
    labels = [["1", "-1"] * 20 for _ in names]
    if kaggle:
        rows = [["image_id", *CELEBA_ATTRIBUTES], *([n, *y] for n, y in zip(names, labels, strict=True))]
        (folder / "list_attr_celeba.csv").write_text("".join(f"{','.join(row)}\n" for row in rows))
        (folder / "list_eval_partition.csv").write_text("".join(f"{n},{i}\n" for i, n in enumerate(["id", *names], -1)))
    else:
        rows = [["3"], [*CELEBA_ATTRIBUTES], *([n, *y] for n, y in zip(names, labels, strict=True))]
        (folder / "list_attr_celeba.txt").write_text("".join(f"{' '.join(row)}\n" for row in rows))
        (folder / "list_eval_partition.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))


def _celeba_images(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 24), (80 * i, 10, 20)).save(folder / "images" / f"{i}.jpg")
    _read_celeba_images(folder)


def _read_celeba_images(folder: Path) -> object:
    for i in range(2):
        celeba_files._decode(folder / "images" / f"{i}.jpg")
    return celeba_files.decoded(folder / "images", ["0.jpg", "1.jpg"], folder / "cache")


def _dense(folder: Path) -> None:
    write_npy_folders(folder, "nyuv2", counts={"val": 2}, size=(8, 12))


def _read_dense(folder: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer samples than were published
        data = DenseFolder(folder, "val", layout=nyuv2.LAYOUT)
        return [data[i] for i in range(len(data))]


def _pascal(folder: Path) -> None:
    write_pascal_folder(folder, counts={"val": 1}, size=(24, 32))


def _read_pascal(folder: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PascalFolder(folder, "val", size=64)[0]


READERS = [
    Reader("plan", lambda f: PLAN.save(f / "plan.json"), lambda f: Plan.load(f / "plan.json")),
    Reader("log", _log, lambda f: ConflictLog.load(f).rank(severity=-0.1)),
    Reader("counted", lambda f: _log(f, counted=True), lambda f: ConflictLog.load(f).rank(severity=-0.1)),
    Reader("run", _run, _read_run),
    Reader("checkpoint", _checkpoint, lambda f: checkpoints.read_checkpoint(f / "last.ckpt")),
    Reader("config", _config, _read_config),
    Reader("split", _split_state, _read_split_state, names_file=False),
    Reader("idx", _idx, _read_idx),
    Reader("cached", _cached, lambda f: multifashion_data.load_full(cache=f)),
    Reader("published", _published, lambda f: multifashion_data.load_published(f / "published.pickle")),
    Reader("celeba", _celeba_lists, read_listing),
    Reader("kaggle", lambda f: _celeba_lists(f, kaggle=True), read_listing),
    Reader("images", _celeba_images, _read_celeba_images),
    Reader("dense", _dense, _read_dense),
    Reader("pascal", _pascal, _read_pascal),
]


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed somewhere; more often where a number stands."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        n = len(data)
        at, length = draw.randrange(n + 1), draw.choice((1, 1, 2, 8, 64))
        kind = draw.randrange(8)
        numbers = [m.span() for m in re.finditer(rb"\d+", data[:4096])]
        if kind == 0 and n:
            at = min(at, n - 1)
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + data[at : at + length] * draw.choice((2, 3, 100)) + data[at:]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + draw.randbytes(length) + data[at + length :]
        elif kind in (5, 6) and numbers:
            start, stop = draw.choice(numbers)
            odd = draw.choice((b"0", b"-1", b"9" * 12, b"18446744073709551615", b"1e999", b"null", b"NaN", b"4" * 500))
            data = data[:start] + odd + data[stop:]
        else:
            data = (
                data[:at] + draw.choice((b'"', b"}", b"[" * 5000, b"\xff\xfe", b"\\ud800", b"{}", b"null")) + data[at:]
            )
    return data


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


@contextmanager
def _folder(reader: Reader) -> Iterator[tuple[Path, dict[Path, bytes]]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader.make(folder)
        if reader.name != "cached":  # its digest cannot be right, so that it is never read to the end
            reader.read(folder)
        yield folder, {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _try(reader: Reader, folder: Path, file: Path, content: bytes, before: bytes) -> str:
    file.write_bytes(content)
    try:
        reader.read(folder)
    except ReconError as error:
        if reader.names_file:
            assert str(folder) in str(error), f"{reader.name}: {error}"
        return "refused"
    finally:
        file.write_bytes(before)
    return "read"


def _bytes_cases(reader: Reader, cases: int, seed: int) -> dict[str, int]:
    draw = random.Random(f"{reader.name} {seed}")
    outcomes = {"read": 0, "refused": 0}
    with _folder(reader) as (folder, files):
        for _ in range(cases):
            file = draw.choice([f for f in files if files[f] or len(files) == 1])
            content = _damaged(files[file], draw)
            try:
                outcomes[_try(reader, folder, file, content, files[file])] += 1
            except Exception as error:
                raise AssertionError(f"{reader.name}, {file.name}: {content[:400]!r} gave {error!r}") from error
    return outcomes


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name)
def test_damaged_bytes_are_refused_by_name(reader: Reader) -> None:
    assert _bytes_cases(reader, FEW, 0)["refused"]


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**300)
    | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def _json_case(reader: Reader, data: st.DataObject, made: tuple[Path, dict[Path, bytes]]) -> None:
    folder, files = made
    file = data.draw(st.sampled_from([f for f in files if f.suffix in (".json", ".jsonl") or f.name == "state"]))
    first, *rest = files[file].split(b"\n") if file.suffix == ".jsonl" else [files[file]]
    value = json.loads(first)
    path = data.draw(st.sampled_from(list(_places(value))))
    changed = json.dumps(_replaced(value, path, data.draw(ODD))).encode()
    _try(reader, folder, file, b"\n".join([changed, *rest]), files[file])


def _value_cases(name: str, cases: int) -> None:
    reader = next(r for r in READERS if r.name == name)
    with _folder(reader) as made:

        @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            _json_case(reader, data, made)

        check()


JSON = ("plan", "log", "counted", "run", "split", "cached")


@pytest.mark.parametrize("name", JSON)
def test_values_of_another_shape_are_refused_by_name(name: str) -> None:
    _value_cases(name, FEW)


def _main() -> None:
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    each = MANY // len(READERS)
    total = 0
    for reader in READERS:
        outcomes = _bytes_cases(reader, each, 1)
        total += sum(outcomes.values())
        print(f"{reader.name:12}{outcomes['refused']:6} refused {outcomes['read']:6} read", flush=True)
    for name in JSON:
        _value_cases(name, 500)
        total += 500
    assert total >= 20_000
    print(f"{total} damaged files: each was read or refused with an error that names it")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds its memory as Linux does")
def test_many_damaged_files_in_bounded_memory(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_images_that_claim_to_be_huge_are_refused_before_they_are_made(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    data = struct.pack(">I", 1000) + b"IDAT" + bytes(1000)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)
    for read in (celeba_files._decode, lambda f: pascal_files._read_image(f, colours=True)):
        with pytest.raises(ReconError, match=r"x\.png cannot be decoded: it claims 9000 x 9000 pixels"):
            read(tmp_path / "x.png")


def test_a_number_that_is_infinite_once_it_is_read_is_refused(tmp_path: Path) -> None:
    _dense(tmp_path)
    file = tmp_path / "val" / "depth" / "1.npy"
    np.save(file, np.load(file).astype(np.float64) + 1e300)
    with pytest.raises(ReconError, match=r"1\.npy: NaN or infinite values"):
        _read_dense(tmp_path)


def test_counts_that_would_unfold_into_more_than_was_recorded_are_refused() -> None:
    counts = Counts.of(torch.zeros(2, 1, 1), torch.zeros(2, 1), torch.ones(2, 1, 2)).tensors()
    for name in ("whole", "layers", "pairs"):
        wrong = {k: v.clone() for k, v in counts.items()}
        wrong[name][..., 0] = 2**31 - 1
        with pytest.raises(ReconError, match="its counts"):
            Counts.from_tensors(wrong)
        wrong[name][..., 0] = -1
        with pytest.raises(ReconError, match="its counts"):
            Counts.from_tensors(wrong)


if __name__ == "__main__":
    _main()
