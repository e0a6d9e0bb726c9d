"""Files that are whole or absent: written to a temporary name, synced, renamed; read with errors that name the file."""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reconmtl.errors import DataError, ReconError, RunError


def write_bytes(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then sync it and rename it to `path`.

    Raises:
        RunError: If the folder cannot be written to or the disk is full; what was there before stays whole.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors writes private files of its own, whatever the user's umask says
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise RunError(f"Cannot write {target}: {cause}. Free space, or choose another folder.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file of `write_bytes` that a killed process has left behind."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) is not None and path.is_file() and not path.is_symlink()


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_bytes(path, write)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON, indented, atomically."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def append_json(path: Path, content: object) -> None:
    """Append one line of JSON, synced: what is there survives whatever comes after.

    Raises:
        RunError: If it cannot be written; what was there before stays.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}. What was saved before is whole.") from error


def read_json(path: str | Path, error: type[ReconError]) -> Any:  # noqa: ANN401 whatever JSON holds; callers check
    """Read JSON; raise `error` with the file's name when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"There is no file {path}.") from None
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}.") from None


def cache_folder() -> Path:
    """Where built data sets are kept: $RECONMTL_CACHE, else the platform's cache folder + '/reconmtl'.

    Raises:
        DataError: If this user has no home folder and no variable says where to keep them.
    """
    chosen = os.environ.get("RECONMTL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    platform: str = sys.platform
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    local = os.environ.get("LOCALAPPDATA", "")
    try:
        if platform == "win32":
            root = Path(local) if local else Path.home() / "AppData" / "Local"
        elif platform == "darwin":
            root = Path.home() / "Library" / "Caches"
        else:
            # The XDG base directory specification has relative paths ignored.
            root = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise DataError(f"No cache folder: {error} Set RECONMTL_CACHE to a folder.") from None
    return root / "reconmtl"
