"""Files are whole or absent; what cannot be read or written is a sentence with its name."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reconmtl.errors import DataError, PlanError, RunError
from reconmtl.files import cache_folder, read_json, write_bytes, write_json


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_file_is_written_and_replaced_and_folders_are_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "file.bin"
    for content in (b"first", b"second, longer"):
        write_bytes(target, lambda temporary, content=content: temporary.write_bytes(content) and None)  # type: ignore[misc]
        assert contents(target.parent) == {"file.bin": content}


class Stop(BaseException):
    """Ctrl-C, a kill signal turned into an exception, or a bug: not an OSError."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stop()], ids=["disk full", "interrupted"])
def test_a_writer_that_fails_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise error

    with pytest.raises((RunError, Stop)) as caught:
        write_bytes(target, write)
    assert contents(tmp_path) == {"file": b"old"}
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"Cannot write {target}: No space left on device. Free space, or choose another folder."
        )


def test_a_failure_inside_safetensors_is_a_sentence_too(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        save_file({"a": torch.ones(2)}, temporary.parent / "nowhere" / "file")

    with pytest.raises(RunError, match=r"Cannot write .*file: .*No such file"):
        write_bytes(tmp_path / "file", write)
    assert contents(tmp_path) == {}


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"Cannot write .*other: .*choose another folder"):
        write_json(tmp_path / "file" / "other", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"Cannot write .*folder: .*directory"):
        write_json(tmp_path / "folder", {})
    assert sorted(contents(tmp_path / "folder")) == [] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_as_private_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a", {})
        write_bytes(tmp_path / "b", lambda temporary: save_file({"a": torch.ones(2)}, temporary))
    finally:
        os.umask(before)
    assert {(tmp_path / n).stat().st_mode & 0o777 for n in "ab"} == {0o666 & ~mask}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(content=JSON)
def test_json_comes_back_as_it_was(content: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    write_json(path, content)
    assert read_json(path, RunError) == content


def test_json_that_others_cannot_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", {"loss": float("nan")})
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1,}', b"\xff\xfe", b"[" * 200_000, b"1" * 5000],
    ids=["empty", "cut", "comma", "no text", "deep", "huge number"],
)
def test_a_damaged_file_is_named_in_the_callers_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"some\.json cannot be read as JSON: "):
        read_json(path, PlanError)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*none\.json\."):
        read_json(tmp_path / "none.json", DataError)
    with pytest.raises(DataError, match=r"cannot be read as JSON: .*directory"):
        read_json(tmp_path, DataError)


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"a": [1]})
    assert (tmp_path / "file").read_text() == json.dumps({"a": [1]}, indent=1) + "\n"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"RECONMTL_CACHE": "/data/here", "XDG_CACHE_HOME": "/xdg"}, "/data/here"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/reconmtl"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/reconmtl"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/reconmtl"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/reconmtl"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/reconmtl"),
        ("win32", {}, "/home/me/AppData/Local/reconmtl"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("RECONMTL_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", "USERPROFILE": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected)
