"""MATLAB's files are read as SciPy reads them, where it does; damage is an error that names the file."""

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import csc_array

from reconmtl.errors import DataError
from reconmtl.problems.matlab import read_matlab


def _plain(value: Any) -> Any:
    """SciPy's nested arrays as ours."""
    if value.dtype.names is not None:
        return [{n: _plain(entry[n]) for n in value.dtype.names} for entry in value.ravel(order="F")]
    if value.dtype.kind == "O":
        return [_plain(v) for v in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return str(value[0]) if value.size else ""
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[n], b[n]) for n in a)
    return bool(a == b)


def _drawn(draw: random.Random, depth: int) -> Any:
    kind = draw.choice(("number", "number", "text") if depth == 0 else ("number", "text", "cell", "struct", "structs"))
    if kind == "number":
        dtype = np.dtype(draw.choice(("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")))
        shape = tuple(draw.randrange(4) for _ in range(draw.choice((2, 2, 3))))
        return (np.arange(np.prod(shape)).reshape(shape) * draw.choice((1, 3))).astype(dtype)
    if kind == "text":
        return draw.choice(("a", "person", "überall", "lear"))
    if kind == "cell":
        cell = np.empty((draw.randrange(1, 3), draw.randrange(1, 3)), dtype=object)
        for at in np.ndindex(cell.shape):
            cell[at] = _drawn(draw, depth - 1)
        return cell
    fields = ["name", "mask", "a_much_longer_name"][: draw.randrange(1, 4)]
    if kind == "struct":
        return {n: _drawn(draw, depth - 1) for n in fields}
    many = np.empty((1, draw.randrange(1, 4)), dtype=[(n, object) for n in fields])
    for i in range(many.shape[1]):
        many[0, i] = tuple(_drawn(draw, depth - 1) for _ in fields)
    return many


@pytest.mark.parametrize("packed", [False, True])
def test_what_scipy_writes_is_read_as_scipy_reads_it(packed: bool, tmp_path: Path) -> None:
    for seed in range(150):
        value = _drawn(random.Random(seed), 3)
        file = tmp_path / "x.mat"
        savemat(file, {"other": np.ones((2, 3)), "wanted": value, "last": "text"}, do_compression=packed)
        assert _same(_plain(loadmat(file)["wanted"]), read_matlab(file, "wanted")), seed


def _file(tmp_path: Path, content: dict[str, Any], *, packed: bool = False) -> Path:
    savemat(tmp_path / "x.mat", content, do_compression=packed)
    return tmp_path / "x.mat"


def test_numbers_that_are_kept_in_fewer_bytes_have_their_class(tmp_path: Path) -> None:
    """MATLAB keeps whole numbers of class double as bytes; and the other byte order."""
    for order in "<>":
        head = b"MATLAB".ljust(124) + struct.pack(f"{order}HH", 0x0100, 0x4D49)
        name = struct.pack(f"{order}I", 1 << 16 | 1) + b"x\0\0\0"
        parts = struct.pack(f"{order}IIII", 6, 8, 6, 0) + struct.pack(f"{order}IIii", 5, 8, 1, 3) + name
        parts += struct.pack(f"{order}I", 3 << 16 | 2) + bytes([1, 2, 250, 0])
        (tmp_path / "x.mat").write_bytes(head + struct.pack(f"{order}II", 14, len(parts)) + parts)
        found = read_matlab(tmp_path / "x.mat", "x")
        assert found.dtype == np.float64 and found.tolist() == [[1.0, 2.0, 250.0]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: b"", "its header is another one"),
        (lambda c: c[:-9], "bytes where"),
        (lambda c: c.replace(struct.pack("<iI", 2, 3), struct.pack("<iI", 2, 2**31 - 1)), "numbers in a variable of"),
        (lambda c: c.replace(struct.pack("<iI", 2, 3), struct.pack("<ii", 2, -3)), "of shape"),
        (lambda c: c.replace(b"wanted", b"hidden"), "there is no such variable"),
    ],
)
def test_damage_names_the_file(change: Any, told: str, tmp_path: Path) -> None:
    file = _file(tmp_path, {"wanted": np.ones((2, 3))})
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=rf"x\.mat is no MATLAB file .version 5 to 7. with wanted: .*{told}"):
        read_matlab(file, "wanted")


@pytest.mark.parametrize(
    ("value", "told"),
    [(np.ones((2, 2)) * 1j, "complex numbers"), (csc_array(np.eye(3)), "a variable of class 5")],
    ids=["complex", "sparse"],
)
def test_what_is_no_plain_data_is_refused(value: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        read_matlab(_file(tmp_path, {"wanted": value}), "wanted")


def test_nothing_unfolds_without_bound(tmp_path: Path) -> None:
    file = _file(tmp_path, {"wanted": np.zeros((2, 2))}, packed=True)
    packer = zlib.compressobj(9)
    buffer = io.BytesIO()
    for _ in range(300):
        buffer.write(packer.compress(bytes(2**20)))
    data = buffer.getvalue() + packer.flush()
    file.write_bytes(file.read_bytes()[:128] + struct.pack("<II", 15, len(data)) + data)
    with pytest.raises(DataError, match="unfolds into more than"):
        read_matlab(file, "wanted")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.mat cannot be read: No such file"):
        read_matlab(tmp_path / "none.mat", "x")
