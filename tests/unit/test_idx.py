"""The original files: what is accepted, how every fault is named, and the download against a server on this machine."""

import gzip
import hashlib
import http.server
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from reconmtl.errors import DataError, RunError
from reconmtl.problems import idx

TRAIN_IMAGES = "mnist/train-images-idx3-ubyte"
FASHION_IMAGES = "fashion-mnist/train-images-idx3-ubyte"


def encode(array: np.ndarray) -> bytes:
    """IDX as LeCun's page describes it."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def generate() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    made = {}
    for name in idx.CHECKSUMS:
        count = 12 if "train" in name else 6
        array = (
            random.integers(256, size=(count, 28, 28), dtype=np.uint8)
            if "images" in name
            else random.integers(10, size=count, dtype=np.uint8)
        )
        made[name] = encode(array)
    return made


FILES = generate()
CHECKSUMS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
PACKED = {name: gzip.compress(content, mtime=0) for name, content in FILES.items()}


def write_all(folder: Path, *, zipped: bool = True) -> Path:
    for name, content in FILES.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKED[name] if zipped else content)
    return folder


def faults(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        idx.read(folder, checksums=CHECKSUMS)
    return str(caught.value)


# The form. ------------------------------------------------------------------------------------------------------------


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_parsing_undoes_encoding(array: np.ndarray) -> None:
    parsed = idx.parse(encode(array))
    assert parsed.dtype == np.uint8 and np.array_equal(parsed, array)


@given(st.integers(0, 12 + 4 * 4), st.booleans())
def test_content_that_is_cut_off_or_too_long_is_refused(cut: int, longer: bool) -> None:
    content = encode(np.ones((4, 2, 2), np.uint8))
    assert len(content) == 32
    with pytest.raises(DataError):
        idx.parse(content + bytes(cut + 1) if longer else content[:cut])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "starts with no bytes at all"),
        (b"<!DOCTYPE html>", "starts with 3c 21 44 4f"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "expected 00 00 08"),  # floats
        (b"\x00\x00\x08\x03\x00\x00", "cut off inside its header: 6 bytes, expected at least 16"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, f"= {(2**32 - 1) ** 3} bytes, 0 follow"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02\x07", "header says 2 = 2 bytes, 1 follow"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02\x07\x07\x07", "is too long"),
    ],
    ids=["empty", "html", "floats", "short header", "huge header", "short", "long"],
)
def test_a_header_is_held_against_the_bytes_there_are(content: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=r"^F ") as caught:
        idx.parse(content, source="F")
    assert complaint in str(caught.value)


# Reading. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("dotted", [True, False])
def test_every_usual_layout_is_read(tmp_path: Path, zipped: bool, torchvision: bool, dotted: bool) -> None:
    write_all(tmp_path, zipped=zipped)
    if torchvision:
        for old, new in (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")):
            (tmp_path / new).mkdir()
            (tmp_path / old).rename(tmp_path / new / "raw")
    if dotted:
        for path in list(tmp_path.rglob("*-idx*")):
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    read = idx.read(tmp_path, checksums=CHECKSUMS)
    assert list(read) == list(CHECKSUMS)
    assert all(encode(read[name]) == FILES[name] for name in FILES)


def test_content_counts_not_packing(tmp_path: Path) -> None:
    write_all(tmp_path)
    content = FILES[TRAIN_IMAGES]
    for packed in (content, gzip.compress(content, 1), gzip.compress(content[:99]) + gzip.compress(content[99:])):
        (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(packed)
        assert idx.read(tmp_path, checksums=CHECKSUMS)[TRAIN_IMAGES].shape == (12, 28, 28)


def test_a_damaged_copy_does_not_hide_a_right_one(tmp_path: Path) -> None:
    write_all(tmp_path)
    write_all(tmp_path, zipped=False)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(b"nothing")
    assert len(idx.read(tmp_path, checksums=CHECKSUMS)) == 8


def test_swapped_files_are_recognised_by_what_they_hold(tmp_path: Path) -> None:
    write_all(tmp_path)
    one, other = tmp_path / f"{TRAIN_IMAGES}.gz", tmp_path / f"{FASHION_IMAGES}.gz"
    one.write_bytes(PACKED[FASHION_IMAGES])
    other.write_bytes(PACKED[TRAIN_IMAGES])
    message = faults(tmp_path)
    assert (
        f"{one} holds the Fashion-MNIST training images, expected the MNIST training images: the files are swapped"
        in message
    )
    assert f"{other} holds the MNIST training images, expected the Fashion-MNIST training images" in message
    assert message.startswith("2 fault(s)")


def test_a_test_split_in_the_place_of_a_training_split_is_recognised(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "mnist/train-labels-idx1-ubyte.gz").write_bytes(PACKED["mnist/t10k-labels-idx1-ubyte"])
    assert "holds the MNIST test labels, expected the MNIST training labels" in faults(tmp_path)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda name: PACKED[name][:-20], "gzip data that is cut off after"),
        (lambda name: PACKED[name][:12], "gzip data that is cut off after 12 bytes"),
        (lambda name: flip(PACKED[name], len(PACKED[name]) // 2), "damaged gzip data"),
        (lambda name: flip(PACKED[name], -6 % len(PACKED[name])), "damaged gzip data: CRC check failed"),
        (lambda name: b"\x1f\x8b\x09" + PACKED[name][3:], "damaged gzip data"),
        (lambda _: b"", "starts with no bytes at all"),
        (lambda _: b"<html>not found</html>", "is not IDX data"),
        (lambda name: FILES[name][:-1], "is cut off: its header says 12 x 28 x 28 = 9408 bytes, 9407 follow"),
        (lambda name: gzip.compress(flip(FILES[name], 999)), f"expected {CHECKSUMS[TRAIN_IMAGES]}"),
    ],
    ids=["cut", "header only", "flipped", "crc", "method", "empty", "html", "short", "other pixels"],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    tmp_path: Path, damage: Callable[[str], bytes], complaint: str
) -> None:
    write_all(tmp_path)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(TRAIN_IMAGES))
    message = faults(tmp_path)
    assert message.startswith("1 fault(s)") and f"{path} " in message and complaint in message


def test_a_gzip_bomb_is_left_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "LARGEST", 20_000)
    write_all(tmp_path)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    assert "unpacks to more than 20000 bytes" in faults(tmp_path)
    path.write_bytes(bytes(20_001))
    assert "is larger than 20000 bytes" in faults(tmp_path)


def test_all_faults_of_all_files_are_reported_at_once_with_the_way_out(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(b"x")
    (tmp_path / f"{FASHION_IMAGES}.gz").unlink()
    label = tmp_path / "fashion-mnist/t10k-labels-idx1-ubyte.gz"
    label.unlink()
    label.mkdir()
    message = faults(tmp_path)
    assert message.startswith("3 fault(s)")
    assert f"{tmp_path / TRAIN_IMAGES}.gz is not IDX data" in message
    assert f"{tmp_path / FASHION_IMAGES}.gz (the Fashion-MNIST training images) is missing" in message
    assert f"{label} cannot be read: Is a directory" in message
    assert "reconmtl data multifashion --from DIR" in message
    assert "reconmtl data multifashion --download" in message


def test_a_folder_that_is_not_there_says_so_first(tmp_path: Path) -> None:
    message = faults(tmp_path / "nowhere")
    assert message.startswith(f"There is no folder {tmp_path / 'nowhere'}. 8 fault(s)")
    assert message.count(" is missing, and not in ") == 8


def test_the_table_of_known_contents_is_complete() -> None:
    assert len(set(idx.CHECKSUMS.values())) == 8
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in idx.CHECKSUMS.values())
    assert {name.partition("/")[0] for name in idx.CHECKSUMS} == set(idx.MIRRORS) == set(idx.FOLDERS)
    assert idx.describe(FASHION_IMAGES) == "the Fashion-MNIST training images"
    assert idx.describe("mnist/t10k-labels-idx1-ubyte") == "the MNIST test labels"


# Download. ------------------------------------------------------------------------------------------------------------


class Mirror:
    """A server on this machine; `answers` maps a path to what it answers, one entry per request, the last for ever."""

    def __init__(self) -> None:
        self.answers: dict[str, list[bytes | int]] = {f"/{name}.gz": [packed] for name, packed in PACKED.items()}
        self.cut: set[str] = set()
        self.requests: list[str] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                queue = mirror.answers.get(self.path, [404])
                answer = queue.pop(0) if len(queue) > 1 else queue[0]
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer[: len(answer) // 2] if self.path in mirror.cut else answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def mirrors(self) -> dict[str, list[str]]:
        return {source: [f"{self.url}/{source}/"] for source in idx.MIRRORS}

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "*")
    made = Mirror()
    yield made
    made.close()


@pytest.fixture
def dead_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def fetch(
    folder: Path, mirrors: dict[str, list[str]], *, attempts: int = 4, progress: bool | None = None
) -> tuple[list[Path], list[float]]:
    pauses: list[float] = []
    try:
        written = idx.download(
            folder, mirrors=mirrors, checksums=CHECKSUMS, attempts=attempts, sleep=pauses.append, progress=progress
        )
    except DataError as error:
        raise DataError(f"{error}\npauses {pauses}") from None
    return written, pauses


def test_download_brings_the_eight_files(tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    written, pauses = fetch(tmp_path, mirror.mirrors)
    assert written == [tmp_path / f"{name}.gz" for name in CHECKSUMS] and pauses == []
    assert {path: path.read_bytes() for path in written} == {tmp_path / f"{n}.gz": p for n, p in PACKED.items()}
    assert len(idx.read(tmp_path, checksums=CHECKSUMS)) == 8
    assert capsys.readouterr() == ("", "")


def test_a_second_download_fetches_nothing(tmp_path: Path, mirror: Mirror) -> None:
    fetch(tmp_path, mirror.mirrors)
    mirror.requests.clear()
    assert fetch(tmp_path, mirror.mirrors) == ([], []) and mirror.requests == []


def test_only_what_is_missing_or_wrong_is_fetched(tmp_path: Path, mirror: Mirror) -> None:
    write_all(tmp_path)
    wrong, gone = tmp_path / f"{TRAIN_IMAGES}.gz", tmp_path / f"{FASHION_IMAGES}.gz"
    wrong.write_bytes(b"wrong")
    gone.unlink()
    assert fetch(tmp_path, mirror.mirrors) == ([wrong, gone], [])
    assert sorted(mirror.requests) == sorted([f"/{TRAIN_IMAGES}.gz", f"/{FASHION_IMAGES}.gz"])


def test_progress_goes_to_stderr(tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(tmp_path, mirror.mirrors, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and all(f"{name}.gz" in err for name in FILES)


def test_faults_that_pass_are_retried_with_growing_pauses(tmp_path: Path, mirror: Mirror) -> None:
    mirror.answers[f"/{TRAIN_IMAGES}.gz"] = [404, 503, b"<html>sorry</html>", PACKED[TRAIN_IMAGES]]
    written, pauses = fetch(tmp_path, mirror.mirrors)
    assert len(written) == 8 and pauses == [1, 2, 4]
    assert len(mirror.requests) == 8 + 3  # the others were not fetched again


def test_a_file_that_arrives_unpacked_is_kept_packed(tmp_path: Path, mirror: Mirror) -> None:
    mirror.answers[f"/{TRAIN_IMAGES}.gz"] = [FILES[TRAIN_IMAGES]]
    fetch(tmp_path, mirror.mirrors)
    assert gzip.decompress((tmp_path / f"{TRAIN_IMAGES}.gz").read_bytes()) == FILES[TRAIN_IMAGES]


def test_the_next_mirror_is_tried_at_once(tmp_path: Path, mirror: Mirror, dead_port: int) -> None:
    dead = f"http://127.0.0.1:{dead_port}/"
    mirrors = {source: [dead, f"{mirror.url}/nothing", *there] for source, there in mirror.mirrors.items()}
    written, pauses = fetch(tmp_path, mirrors)
    assert len(written) == 8 and pauses == []


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (404, "answered 404 Not Found"),
        (PACKED[FASHION_IMAGES], "holds the Fashion-MNIST training images, expected the MNIST training images"),
        (gzip.compress(encode(np.zeros((2, 2), np.uint8))), "does not hold the MNIST training images: sha256"),
        (b"<html>login</html>", "is not IDX data"),
        (PACKED[TRAIN_IMAGES][:-30], "is gzip data that is cut off"),
    ],
    ids=["404", "another", "unknown", "html", "cut"],
)
def test_a_file_that_stays_wrong_is_an_error_that_says_what_to_do(
    tmp_path: Path, mirror: Mirror, answer: bytes | int, complaint: str
) -> None:
    mirror.answers[f"/{TRAIN_IMAGES}.gz"] = [answer]
    with pytest.raises(DataError) as caught:
        fetch(tmp_path, mirror.mirrors, attempts=2)
    message = str(caught.value)
    assert message.startswith("1 of 8 files could not be downloaded:")
    assert f"{mirror.url}/{TRAIN_IMAGES}.gz {complaint}" in message
    assert f"\n  {tmp_path / TRAIN_IMAGES}.gz\n" in message
    assert f"reconmtl data multifashion --from {tmp_path}\n" in message
    assert "pauses [1.0]" in message
    # The right ones were kept, whole; the wrong one left nothing behind.
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {tmp_path / f"{n}.gz" for n in FILES if n != TRAIN_IMAGES}


def test_a_connection_that_breaks_off_is_named(tmp_path: Path, mirror: Mirror) -> None:
    mirror.cut.add(f"/{TRAIN_IMAGES}.gz")
    size = len(PACKED[TRAIN_IMAGES])
    with pytest.raises(DataError, match=f"broke off after {size // 2} of {size} bytes"):
        fetch(tmp_path, mirror.mirrors, attempts=1)


def test_without_a_network_all_files_are_listed_and_no_mirror_is_asked_eight_times(
    tmp_path: Path, dead_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    asked: list[str] = []
    original = urllib.request.urlopen

    def counting(url: str, *, timeout: float) -> object:
        asked.append(url)
        return original(url, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", counting)
    with pytest.raises(DataError) as caught:
        fetch(tmp_path, {source: [f"http://127.0.0.1:{dead_port}/"] for source in idx.MIRRORS}, attempts=3)
    message = str(caught.value)
    assert message.startswith("8 of 8 files") and message.count("cannot be reached") == 8
    assert all(f"\n  {tmp_path / name}.gz\n" in message for name in FILES)
    assert len(asked) == 3  # once per round
    assert not list(tmp_path.iterdir())


def test_a_source_without_mirrors_is_reported_like_a_failed_one(tmp_path: Path, mirror: Mirror) -> None:
    with pytest.raises(DataError, match="4 of 8 files could not be downloaded"):
        fetch(tmp_path, {"mnist": mirror.mirrors["mnist"]})


def test_a_folder_that_cannot_be_written_is_a_run_error(tmp_path: Path, mirror: Mirror) -> None:
    (tmp_path / "mnist").write_text("a file, not a folder")
    with pytest.raises(RunError, match="Cannot write"):
        idx.download(tmp_path, mirrors=mirror.mirrors, checksums=CHECKSUMS)
