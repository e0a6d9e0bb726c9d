"""Leave a training between two steps when the user, a cluster or a service asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from reconmtl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
