"""Leave a training between two steps when the user, a cluster or a service asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from reconmtl.errors import Interrupted, ReconError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESUME = "repeat the command with --resume"
_asked: list[int] = []


@contextmanager
def asked_politely() -> Iterator[None]:
    """Note SIGINT and SIGTERM inside instead of acting on them at once; a second one ends at once.

    Signals that somebody else handles, and threads other than the main one, are left alone.
    """
    if threading.current_thread() is not threading.main_thread() or _installed():
        yield
        return
    before = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = handler
            signal.signal(number, _note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


@contextmanager
def keeping(folder: Path, again: str = RESUME) -> Iterator[None]:
    """Say, with whatever ends the work inside, what is kept of it and how to go on.

    An interruption says it unless it does already; an error that was not foreseen gets a note. Errors of ours are left
    as they are.

    Args:
        folder: Of the results.
        again: What to do to go on.
    """
    try:
        yield
    except ReconError:
        raise
    except KeyboardInterrupt as asked:
        if not isinstance(asked, Interrupted):
            raise Interrupted(signal.SIGINT, _kept(folder, again)) from None
        saved = asked.saved.replace(RESUME.capitalize(), again.capitalize())  # not every command has that option
        raise Interrupted(asked.signal, saved or _kept(folder, again)) from None
    except Exception as error:
        error.add_note(_kept(folder, again))
        raise


def _kept(folder: Path, again: str) -> str:
    if any(any(folder.rglob(name)) for name in ("result.json", "log.json")):
        return f"What is finished is kept in {folder}: {again} to go on."
    if any(folder.rglob("*.ckpt")):
        return f"Nothing is finished yet, but what was trained is kept in {folder}: {again} to go on."
    return f"Nothing is finished yet in {folder}: {again} to begin again."


def leave_if_asked() -> None:
    """Raise if a signal came.

    Raises:
        Interrupted: If so; the caller saves its state first, or says what is saved.
    """
    if _asked:
        raise interruption()


def was_asked() -> bool:
    """Whether a signal came."""
    return bool(_asked)


def interruption() -> Interrupted:
    """What to raise for the signal that came, to this process or another of those that train together."""
    return Interrupted(signal.Signals(_asked[0] if _asked else signal.SIGTERM))


def _note(number: int, _frame: FrameType | None) -> None:
    if _asked:  # waiting was not meant
        raise Interrupted(signal.Signals(number))
    _asked.append(number)


def _installed() -> bool:
    return any(signal.getsignal(number) is _note for number in SIGNALS)
