"""Read one variable of a MATLAB file, version 5 (what MATLAB saves up to -v7), whatever state the file is in.

SciPy's reader ends the whole process on some damaged files; this one checks every length before it is used, and takes
no memory for more than the file holds.

Reference: MathWorks, MAT-File Format, https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf.
"""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from reconmtl.errors import DataError

UNPACKED = 2**28
"""Bytes that a variable may unfold into: zeros are packed a thousandfold."""
DEPTH = 16
"""Cells and structures inside one another, at most."""

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""How numbers are kept; possibly in fewer bytes than their class has."""
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_TEXT = {16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _PACKED = 14, 15
_COMPLEX = 0x08


def read_matlab(path: Path, name: str) -> Any:  # noqa: ANN401 MATLAB's arrays hold anything
    """Read one variable.

    Args:
        path: The file.
        name: Of the variable.

    Returns:
        Numbers as an array of the variable's shape and class; text as str; a cell as a list of its entries, a structure
        as a list of dicts in the order of its fields, both column by column.

    Raises:
        DataError: If there is no such variable, it is of another kind (objects, sparse or complex numbers), or the file
            is damaged or of another version; it is named.
    """
    try:
        return _variable(path.read_bytes(), name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (DataError, ValueError, OverflowError, zlib.error) as error:  # of text that is none
        raise DataError(f"{path} is no MATLAB file (version 5 to 7) with {name}: {error}.") from None


def _variable(content: bytes, name: str) -> Any:  # noqa: ANN401
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise DataError("its header is another one")
    file = _Elements(content, 128, order)
    while file.at < len(content):
        kind, data = file.element(padded=False)
        if kind == _PACKED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(data, UNPACKED)
            if unpacker.unconsumed_tail:
                raise DataError(f"a variable that unfolds into more than {UNPACKED:,} bytes")
            kind, data = _Elements(unpacked, 0, order).element()
        if kind == _MATRIX:
            found = _matrix(data, order, DEPTH, wanted=name)
            if found is not _OTHER:
                return found
    raise DataError("there is no such variable in it")


_OTHER = object()


class _Elements:
    """The elements that bytes hold, one after the other."""

    def __init__(self, content: bytes, at: int, order: str) -> None:
        self.content, self.at, self.order = content, at, order

    def element(self, *, padded: bool = True) -> tuple[int, bytes]:
        """Type and data of the next one."""
        tag = self._take(8)
        small, kind = self._number(tag[2:4]), self._number(tag[:2])
        if self.order == ">":
            small, kind = kind, small
        if small:  # both in eight bytes
            if small > 4:
                raise DataError(f"a short element of {small} bytes")
            return kind, tag[4 : 4 + small]
        kind, length = self._number(tag[:4]), self._number(tag[4:])
        data = self._take(length)
        if padded and kind != _PACKED:
            self.at = min(len(self.content), self.at + -length % 8)
        return kind, data

    def numbers(self) -> np.ndarray[Any, Any]:
        """The next one, which holds numbers."""
        kind, data = self.element()
        if kind not in _NUMBERS:
            raise DataError(f"an element of type {kind} instead of numbers")
        return np.frombuffer(data, np.dtype(self.order + _NUMBERS[kind]))

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self.content) - self.at

    def _take(self, length: int) -> bytes:
        if length > self.left:
            raise DataError(f"an element of {length:,} bytes where {self.left:,} are left")
        self.at += length
        return self.content[self.at - length : self.at]

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self.order == "<" else "big")


def _matrix(data: bytes, order: str, depth: int, wanted: str | None = None) -> Any:  # noqa: ANN401
    """What one matrix element holds; `_OTHER` if it is not the wanted variable."""
    if not data:
        return np.zeros((0, 0))
    if depth == 0:
        raise DataError(f"more than {DEPTH} cells or structures inside one another")
    file = _Elements(data, 0, order)
    flags = file.numbers()
    shape = tuple(file.numbers().tolist())
    _, name = file.element()
    if wanted is not None and name.decode("latin1") != wanted:
        return _OTHER
    if (
        flags.dtype.kind != "u"
        or flags.size != 2
        or not all(type(n) is int and n >= 0 for n in shape)
        or len(shape) < 2
    ):
        raise DataError(f"a variable of shape {shape}")
    kind, count = int(flags[0]) & 0xFF, math.prod(shape)
    if int(flags[0]) >> 8 & _COMPLEX:
        raise DataError("complex numbers")
    if kind in _CLASSES:
        numbers = file.numbers()
        if len(numbers) != count:
            raise DataError(f"{len(numbers):,} numbers in a variable of shape {shape}")
        return _as_class(numbers, _CLASSES[kind]).reshape(shape, order="F")
    if kind == _CHAR:
        return _text(file, order)
    if kind == _CELL:
        return [_next(file, order, depth) for _ in _counted(count, file)]
    if kind == _STRUCT:
        (length,) = file.numbers().tolist()[:1] or [0]
        _, text = file.element()
        if type(length) is not int or length < 1 or len(text) % length:
            raise DataError(f"names of fields in {length!r} bytes each")
        names = [text[i : i + length].split(b"\0")[0].decode("latin1") for i in range(0, len(text), length)]
        if not names:
            return []
        return [{n: _next(file, order, depth) for n in names} for _ in _counted(count, file)]
    raise DataError(f"a variable of class {kind}: expected numbers, text, cells or structures")


def _as_class(numbers: np.ndarray[Any, Any], code: str) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        kept = numbers.astype(code)
    if not np.array_equal(kept, numbers, equal_nan=numbers.dtype.kind == "f"):
        raise DataError(f"numbers that do not fit into {np.dtype(code)}")
    return kept


def _counted(count: int, file: _Elements) -> range:
    """As many entries as there are, if there can be so many: each takes eight bytes at least."""
    if count * 8 > file.left:
        raise DataError(f"{count:,} entries in {file.left:,} bytes")
    return range(count)


def _next(file: _Elements, order: str, depth: int) -> Any:  # noqa: ANN401
    kind, data = file.element()
    if kind != _MATRIX:
        raise DataError(f"an entry of type {kind}")
    return _matrix(data, order, depth - 1)


def _text(file: _Elements, order: str) -> str:
    """Text, column by column, so that one row of it is as it is read."""
    kind, data = file.element()
    if kind in _NUMBERS and _NUMBERS[kind][0] == "u":
        return "".join(map(chr, np.frombuffer(data, np.dtype(order + _NUMBERS[kind])).tolist()))
    if kind not in _TEXT:
        raise DataError(f"text of type {kind}")
    return data.decode(_TEXT[kind] + ("" if kind == 16 else "-le" if order == "<" else "-be"))
