"""Progress on stderr: one bar with an ETA per training, several trainings side by side."""

import sys
from typing import Any, Literal

from tqdm import tqdm

Mode = Literal["auto", "always", "never"]
_state: dict[str, Any] = {"mode": "auto", "position": None}


def configure(mode: Mode, *, lock: Any = None, position: int | None = None) -> None:  # noqa: ANN401 a multiprocessing lock
    """Choose when bars are shown.

    Args:
        mode: "auto" shows them on a terminal, "always" also in files and pipes (refreshed rarely), "never" not at all.
        lock: Shared by processes that write to the same terminal.
        position: The line that this process writes to.
    """
    _state.update(mode=mode, position=position)
    if lock is not None:
        tqdm.set_lock(lock)


def bar(total: int, description: str, unit: str = "step", *, done: int = 0, hidden: bool = False) -> "tqdm[Any]":
    """A progress bar with ETA on stderr; `done` of the total were done before."""
    terminal = sys.stderr.isatty()
    hidden = hidden or _state["mode"] == "never" or (_state["mode"] == "auto" and not terminal)
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        file=sys.stderr,
        disable=hidden,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 5.0,
        position=_state["position"] if terminal else None,
        leave=_state["position"] is None or not terminal,
    )
