"""Arrays of every age and form are read; whatever else a pickle may hold is refused and never run."""

import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reconmtl.errors import DataError
from reconmtl.problems.array_pickle import load_arrays


def examples() -> list[NDArray[Any]]:
    random = np.random.default_rng(1)
    return [random.integers(256, size=shape) for shape in ((7, 5, 4), (7, 2), (3,), ())]


def names(count: int) -> list[str]:
    return [f"array {i}" for i in range(count)]


def write_pickle(path: Path, content: object, *, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def assert_same(path: Path, arrays: list[NDArray[Any]]) -> None:
    loaded = load_arrays(path, names(len(arrays)))
    for found, expected in zip(loaded, arrays, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8", ">i4"])
def test_arrays_of_every_protocol_and_dtype_are_read(tmp_path: Path, protocol: int, dtype: str) -> None:
    arrays = [a.astype(dtype) for a in examples()]
    assert_same(write_pickle(tmp_path / "p", tuple(arrays), protocol=protocol), arrays)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2)[::2]], ids=["fortran", "strided"])
def test_layouts_are_read(tmp_path: Path, protocol: int, layout: Callable[[Any], Any]) -> None:
    arrays = [layout(a) for a in examples()]
    assert_same(write_pickle(tmp_path / "p", arrays, protocol=protocol), arrays)


@pytest.mark.parametrize("protocol", range(6))
def test_old_and_new_names_of_numpys_modules_are_known(tmp_path: Path, protocol: int) -> None:
    path = write_pickle(tmp_path / "p", tuple(examples()), protocol=protocol)
    content = path.read_bytes()
    old, new = b"numpy.core.", b"numpy._core."
    here, there = (new, old) if new in content else (old, new)
    assert here in content
    if protocol < 4:
        path.write_bytes(content.replace(here, there))
    else:  # these protocols say how long a name is
        for module in (b"multiarray", b"numeric"):
            name, other = here + module, there + module
            content = content.replace(bytes([len(name)]) + name, bytes([len(other)]) + other)
        # ... and how long the first frame is; without frames the rest is still a whole pickle.
        path.write_bytes(content[:2] + content[11:])
    assert (there in path.read_bytes()) and here not in path.read_bytes()
    assert_same(path, examples())


def python2(arrays: list[NDArray[Any]]) -> bytes:
    """The same tuple as Python 2 with an old NumPy pickled it under protocol 2: raw data are its `str`."""
    out = io.BytesIO()
    out.write(b"\x80\x02(")
    for a in arrays:
        raw = a.astype("<i8").tobytes()
        out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(")
        out.write(b"".join(b"J" + struct.pack("<i", n) for n in a.shape) + b"t")
        out.write(b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        out.write(b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb")
    out.write(b"t.")
    return out.getvalue()


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(python2(examples()))
    assert_same(tmp_path / "p", examples())


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_a_command_in_the_file_is_not_run_and_named(tmp_path: Path, protocol: int, place: str) -> None:
    attack = Attack(tmp_path / "ran")
    array = np.empty(1, dtype=object)
    array[0] = attack
    content = {"alone": attack, "beside": (*examples(), attack), "inside": (array, *examples()[1:])}[place]
    path = write_pickle(tmp_path / "evil.pickle", content, protocol=protocol)
    expected = r"system|array of dtype 'O8'" if place == "inside" else rf"the name {os.name}\.system"
    with pytest.raises(DataError, match=rf"evil\.pickle holds .*({expected}).*nothing in it was run"):
        load_arrays(path, names(4))
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have been


@pytest.mark.parametrize(
    "forbidden",
    [
        b"cbuiltins\neval\n.",
        b"c__builtin__\neval\n.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray.__class__\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cfunctools\npartial\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    ],
)
def test_names_that_no_array_needs_are_refused(tmp_path: Path, forbidden: bytes) -> None:
    (tmp_path / "p").write_bytes(forbidden)
    with pytest.raises(DataError, match=r"holds the name .*, which no array of numbers needs"):
        load_arrays(tmp_path / "p", names(1))


def test_functions_that_are_known_cannot_be_changed_by_the_file(tmp_path: Path) -> None:
    # BUILD with a second state would set attributes on whatever function was named.
    (tmp_path / "p").write_bytes(b"\x80\x02c_codecs\nencode\nN}X\x04\x00\x00\x00evilK\x01s\x86b.")
    with pytest.raises(DataError, match="an attempt to change a function"):
        load_arrays(tmp_path / "p", names(1))


def state(shape: bytes, raw: bytes, dtype: bytes = b"u1") -> bytes:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    kind = b"cnumpy\ndtype\n(X" + struct.pack("<i", len(dtype)) + dtype + b"I00\nI01\ntR"
    return b"\x80\x03" + array + b"(K\x01" + shape + kind + b"I00\nC" + bytes([len(raw)]) + raw + b"tb."


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (state(b"K\x03\x85", b"ab"), r"shape \(3,\) and dtype uint8 in 2 bytes"),
        (state(b"\x8a\x08" + b"\xff" * 7 + b"\x0f\x85", b"ab"), r"in 2 bytes"),  # 2**60: nothing is allocated
        (state(b"J\xff\xff\xff\xff\x85", b"ab"), r"of shape \(-1,\)"),
        (state(b"K\x03", b"abc"), "of shape 3"),
        (state(b"K\x03\x85", b"abc", b"O8"), "of dtype 'O8'"),
        (state(b"K\x03\x85", b"abc", b"V3"), "of dtype 'V3'"),
        (state(b"K\x03\x85", b"abc", b"S1"), "of dtype 'S1'"),
        (state(b"K\x01\x85", b"abcdefgh", b"M8"), "of dtype 'M8'"),
    ],
    ids=["short", "huge", "negative", "no tuple", "object", "void", "text", "date"],
)
def test_arrays_that_do_not_match_their_bytes_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_arrays(tmp_path / "p", names(1))


@given(cut=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_file_that_is_cut_off_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.pickle"
    content = pickle.dumps(tuple(examples()), protocol=cut % 6)
    path.write_bytes(content[: len(content) * cut // 201])
    with pytest.raises(DataError, match=r"cut\.pickle"):
        load_arrays(path, names(4))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (examples()[:1], r"expected \(array 0, array 1\), found 1 entries"),
        ({"array 0": 1}, "found dict"),
        (examples()[0], "found one array"),
        ([examples()[0], [1, 2]], "array 1 should be an array of numbers, found list"),
    ],
)
def test_content_that_is_not_these_arrays_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    path = write_pickle(tmp_path / "some.pickle", content)
    with pytest.raises(DataError, match=rf"some\.pickle.*{complaint}"):
        load_arrays(path, names(2))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.pickle cannot be read: No such file"):
        load_arrays(tmp_path / "none.pickle", names(1))
