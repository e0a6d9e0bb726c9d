"""Read arrays from a pickle without running anything that may hide in it.

A pickle is a program. The unpickler here knows the few names that NumPy arrays of plain numbers need, maps them to
harmless stand-ins, and refuses every other name.
"""

import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reconmtl.errors import DataError


def load_arrays(path: str | Path, fields: Sequence[str]) -> list[NDArray[Any]]:
    """Read a pickled tuple or list of arrays.

    Args:
        path: The file, of any pickle protocol, written by Python 2 or 3.
        fields: What each of its arrays is called in errors.

    Returns:
        As many arrays as there are fields; some of them may be read-only.

    Raises:
        DataError: If the file names anything but arrays of plain numbers, is damaged, or holds something else.
    """
    try:
        with Path(path).open("rb") as handle:
            content = _ArrayUnpickler(handle, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path} holds {error}. It was not loaded; nothing in it was run.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} is not a whole pickle file: {type(error).__name__}: {error}.") from None
    if not isinstance(content, tuple | list) or len(content) != len(fields):
        kind = "one array" if isinstance(content, _Array) else type(content).__name__
        found = f"{len(content)} entries" if isinstance(content, tuple | list) else kind
        raise DataError(f"{path}: expected ({', '.join(fields)}), found {found}.")
    arrays = []
    for field, entry in zip(fields, content, strict=True):
        if not isinstance(entry, _Array) or entry.array is None:
            raise DataError(f"{path}: {field} should be an array of numbers, found {type(entry).__name__}.")
        arrays.append(entry.array)
    return arrays


class _Dtype:
    """Stands in for numpy.dtype while unpickling: plain numbers only; nothing of NumPy's own unpickling runs."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", code):
            raise DataError(f"an array of dtype {code!r}, expected plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise DataError(f"a dtype in byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for numpy.ndarray while unpickling: sizes are checked before anything is made."""

    array: NDArray[Any] | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise DataError("an array whose state is not one of NumPy's")
        shape, dtype, fortran, raw = state[-4:]
        self.array = _make_array(raw, dtype, shape, "F" if fortran else "C")


def _make_array(raw: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    if isinstance(raw, str):  # Python 2 wrote bytes as str
        raw = raw.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise DataError("an array that does not hold plain numbers")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or order not in ("C", "F"):
        raise DataError(f"an array of shape {shape!r}, order {order!r}")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise DataError(f"an array of shape {shape} and dtype {dtype.dtype} in {len(raw)} bytes")
    flat = np.frombuffer(raw, dtype=dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


class _Function:
    """A function that a pickle may call but not write attributes to, as it could to a plain one."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise DataError("an attempt to change a function")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(raw: object, dtype: object, shape: object, order: object, *_: object) -> _Array:
    made = _Array()
    made.array = _make_array(raw, dtype, shape, order)
    return made


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise DataError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Function(_encode),
    ("numpy.core.multiarray", "_reconstruct"): _Function(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Function(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _Function(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): _Function(_frombuffer),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the names that NumPy arrays need, maps them to harmless stand-ins, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 whatever a pickle may name
        if (module, name) not in _ALLOWED:
            raise DataError(f"the name {module}.{name}, which no array of numbers needs")
        return _ALLOWED[module, name]
