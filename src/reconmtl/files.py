"""Files that are whole or absent: written to a temporary name, synced, renamed; read with errors that name the file."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reconmtl.errors import ReconError, RunError


def write_bytes(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then sync it and rename it to `path`.

    Raises:
        RunError: If the folder cannot be written to or the disk is full; what was there before stays whole.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)  # mkstemp makes files private; results are to be read by others
        temporary.replace(target)
    except OSError as error:
        raise RunError(
            f"Cannot write {target}: {error.strerror or error}. Free space, or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON, indented, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_bytes(path, write)


def read_json(path: str | Path, error: type[ReconError]) -> Any:  # noqa: ANN401 whatever JSON holds; callers check
    """Read JSON; raise `error` with the file's name when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}.") from None
