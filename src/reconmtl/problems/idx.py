"""MNIST and Fashion-MNIST in their original IDX form: find, verify by content, read, download.

The eight files are known by the sha256 of their *unpacked* bytes, so that a repacked .gz is as good as the original and
a file under another's name is recognised for what it holds.
"""

import gzip
import hashlib
import http.client
import io
import math
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from reconmtl.errors import DataError
from reconmtl.files import write_bytes

Bytes = NDArray[np.uint8]

CHECKSUMS: Mapping[str, str] = {
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""sha256 of the unpacked content of each file, by its name below the data folder (without '.gz')."""

MIRRORS: Mapping[str, Sequence[str]] = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
}
"""Where torchvision downloads from, too; tried in this order."""

FOLDERS: Mapping[str, Sequence[str]] = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw"),
}
"""Subfolders to look in: the original names, then torchvision's layout."""

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}

LARGEST = 64 * 2**20
"""No file of the eight is larger, packed or unpacked [bytes]; reading stops there."""


def describe(name: str) -> str:
    """Say in words what a file holds, e.g. 'the Fashion-MNIST training images'."""
    source, _, stem = name.partition("/")
    split = "training" if stem.startswith("train") else "test"
    return f"the {TITLES[source]} {split} {'images' if 'images' in stem else 'labels'}"


def parse(content: bytes, *, source: str = "The content") -> Bytes:
    """Read IDX content: two zero bytes, 8 (unsigned bytes), the number of dimensions, big-endian sizes, the data.

    Args:
        content: The whole unpacked file.
        source: Its name in error messages.

    Returns:
        A read-only array over `content`, images [N, 28, 28] or labels [N].

    Raises:
        DataError: If the header is not IDX of unsigned bytes, or its sizes differ from the number of bytes that follow.

    Reference: LeCun, Cortes, Burges: The MNIST database of handwritten digits, section 'FILE FORMATS'.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        found = content[:4].hex(" ") or "no bytes at all"
        raise DataError(f"{source} is not IDX data of unsigned bytes: starts with {found}, expected 00 00 08")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{source} is cut off inside its header: {len(content)} bytes, expected at least {start}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = math.prod(shape)  # Python integers: no overflow, and nothing is allocated by what a header claims
    if len(content) - start != expected:
        sizes = " x ".join(str(n) for n in shape)
        state = "is cut off" if len(content) - start < expected else "is too long"
        raise DataError(f"{source} {state}: its header says {sizes} = {expected} bytes, {len(content) - start} follow")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _unpack(packed: bytes, source: str) -> bytes:
    """The content of a file that may be gzipped, whatever its name says; bounded, whatever the file says."""
    if packed[:2] != b"\x1f\x8b":
        return packed
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as handle:
            content = handle.read(LARGEST + 1)
    except EOFError:
        raise DataError(f"{source} is gzip data that is cut off after {len(packed)} bytes") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source} is damaged gzip data: {error}") from None
    if len(content) > LARGEST:
        raise DataError(f"{source} unpacks to more than {LARGEST} bytes, which none of the eight files does")
    return content


def _verify(name: str, packed: bytes, checksums: Mapping[str, str], source: str) -> bytes:
    """Return the unpacked content if it is what `name` should hold; else a DataError that says what it is instead."""
    content = _unpack(packed, source)
    found = hashlib.sha256(content).hexdigest()
    if found == checksums[name]:
        return content
    for other, checksum in checksums.items():
        if found == checksum:
            raise DataError(f"{source} holds {describe(other)}, expected {describe(name)}: the files are swapped")
    parse(content, source=source)
    raise DataError(
        f"{source} does not hold {describe(name)}: sha256 of its unpacked content is {found}, "
        f"expected {checksums[name]}"
    )


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    source, _, stem = name.partition("/")
    dotted = stem.replace("-idx", ".idx")  # as the files inside the original archives are called
    for place in FOLDERS[source]:
        for file in (f"{stem}.gz", stem, f"{dotted}.gz", dotted):
            yield folder / place / file


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            packed = handle.read(LARGEST + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(packed) > LARGEST:
        raise DataError(f"{path} is larger than {LARGEST} bytes, which none of the eight files is")
    return packed


def _find(folder: Path, name: str, checksums: Mapping[str, str]) -> tuple[bytes | None, list[str]]:
    """Return the content of one file, from the first place where it is right; else the faults of all places."""
    faults = []
    for path in _candidates(folder, name):
        if path.exists():
            try:
                return _verify(name, _read_bytes(path), checksums, str(path)), []
            except DataError as error:
                faults.append(str(error))
    if not faults:
        source, _, stem = name.partition("/")
        first, *rest = [folder / place for place in FOLDERS[source]]
        others = " or ".join(str(place) for place in rest)
        faults.append(f"{first / stem}.gz ({describe(name)}) is missing, and not in {others} either")
    return None, faults


def read(folder: str | Path, *, checksums: Mapping[str, str] = CHECKSUMS) -> dict[str, Bytes]:
    """Read and verify the eight files of MNIST and Fashion-MNIST, gzipped or not.

    Args:
        folder: Holds `mnist/` and `fashion-mnist/`, or torchvision's `MNIST/raw` and `FashionMNIST/raw`.
        checksums: File name -> sha256 of the unpacked content; another table reads files of the same form.

    Returns:
        File name (as in `checksums`) -> read-only uint8 array, images [N, 28, 28] and labels [N].

    Raises:
        DataError: If files are missing, damaged or swapped: all faults of all files at once.

    Example:
        >>> read("data")["mnist/train-images-idx3-ubyte"].shape  # doctest: +SKIP
        (60000, 28, 28)
    """
    root = Path(folder)
    contents: dict[str, bytes] = {}
    faults: list[str] = []
    for name in checksums:
        content, found = _find(root, name, checksums)
        faults += found
        if content is not None:
            contents[name] = content
    if faults:
        here = "" if root.is_dir() else f"There is no folder {root}. "
        raise DataError(
            f"{here}{len(faults)} fault(s) in the data files:\n"
            + "\n".join(f"  {fault}." for fault in faults)
            + "\nExpected the original files, e.g. DIR/mnist/train-images-idx3-ubyte.gz. Bring them, then run "
            + "`reconmtl data multifashion --from DIR`; or fetch them with `reconmtl data multifashion --download`."
        )
    return {name: parse(content) for name, content in contents.items()}


class _Unreachable(Exception):
    """The mirror does not answer at all: no use in asking it for the other files now."""


def _fetch(url: str, *, timeout: float, progress: bool | None) -> bytes:
    """Fetch one file into memory (the largest has 26 MB)."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            packed = bytearray()
            with tqdm(
                desc="/".join(url.split("/")[-2:]),
                total=total,
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                disable=None if progress is None else not progress,
            ) as bar:
                while len(packed) <= LARGEST and (chunk := answer.read(2**16)):
                    packed += chunk
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url} answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Unreachable(f"cannot be reached: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} broke off: {str(error) or type(error).__name__}") from None
    if total is not None and len(packed) < total:
        raise DataError(f"{url} broke off after {len(packed)} of {total} bytes")
    if len(packed) > LARGEST:
        raise DataError(f"{url} sends more than {LARGEST} bytes, which none of the eight files has")
    return bytes(packed)


def download(
    folder: str | Path,
    *,
    mirrors: Mapping[str, Sequence[str]] = MIRRORS,
    checksums: Mapping[str, str] = CHECKSUMS,
    attempts: int = 4,
    base: float = 1.0,
    sleep: Callable[[float], object] = time.sleep,
    timeout: float = 20.0,
    progress: bool | None = None,
) -> list[Path]:
    """Fetch the eight files into `folder`; those that are already there and right are left alone.

    Args:
        folder: Gets `mnist/*.gz` and `fashion-mnist/*.gz`; each file is verified before it is written.
        mirrors: Source -> addresses of the folders that hold its files, tried in order.
        checksums: File name -> sha256 of the unpacked content.
        attempts: Rounds over whatever is still missing.
        base: Pause before the second round [s]; doubles with every further one.
        sleep: How to pause.
        timeout: Of one connection [s].
        progress: A bar per file on stderr; None shows it on a terminal only.

    Returns:
        The files written by this call.

    Raises:
        DataError: If a file cannot be had; says what each mirror answered and what to do without a network.
    """
    root = Path(folder)
    missing = [name for name in checksums if _find(root, name, checksums)[0] is None]
    written: list[Path] = []
    faults: dict[str, list[str]] = {}
    for attempt in range(attempts):
        if missing and attempt:
            sleep(base * 2 ** (attempt - 1))
        dead: dict[str, str] = {}
        for name in list(missing):
            source, _, stem = name.partition("/")
            faults[name] = []
            for mirror in mirrors.get(source, ()):
                url = f"{mirror.rstrip('/')}/{stem}.gz"
                if mirror in dead:
                    faults[name].append(f"{url} {dead[mirror]}")
                    continue
                try:
                    packed = _fetch(url, timeout=timeout, progress=progress)
                    _verify(name, packed, checksums, url)
                except _Unreachable as error:
                    dead[mirror] = str(error)
                    faults[name].append(f"{url} {error}")
                except DataError as error:
                    faults[name].append(str(error))
                else:
                    written.append(_store(root / source / f"{stem}.gz", packed))
                    missing.remove(name)
                    break
    if missing:
        raise DataError(_offline(root, {name: faults.get(name, []) for name in missing}, len(checksums)))
    return written


def _store(path: Path, packed: bytes) -> Path:
    # A mirror may have unpacked the file on its way; the name promises gzip.
    content = packed if packed[:2] == b"\x1f\x8b" else gzip.compress(packed, mtime=0)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_bytes(path, write)
    return path


def _offline(root: Path, faults: Mapping[str, Sequence[str]], count: int) -> str:
    lines = [f"{len(faults)} of {count} files could not be downloaded:"]
    for name, answers in faults.items():
        lines.append(f"  {name}.gz ({describe(name)})")
        lines += [f"    {answer}" for answer in answers]
    lines += ["Without a network: get these files on another machine and put them here, under exactly these names:"]
    lines += [f"  {root / name}.gz" for name in faults]
    lines += [f"Then run: reconmtl data multifashion --from {root}"]
    return "\n".join(lines)
