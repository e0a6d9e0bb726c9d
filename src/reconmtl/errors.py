"""The exception tree: every message says what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from signal import Signals


class ReconError(Exception):
    """Root of everything that reconmtl raises on purpose; catching it never hides a bug of ours."""


class UnknownNameError(ReconError, ValueError):
    """A name that is not among the known ones; use one that is listed."""


class LayerMatchError(UnknownNameError):
    """A layer name or pattern that matches no layer which owns parameters; list them with `rm.layer_table(model)`."""


class PlanError(ReconError, ValueError):
    """A plan that contradicts itself or the model it is used with; fix the field that the message names."""


class SplitError(ReconError, RuntimeError):
    """A model that cannot be split as planned without changing what it computes; the message names the way out."""


class OptimizerError(ReconError, ValueError):
    """An optimizer that does not hold the parameters it should; build it after the split."""


class SeverityError(ReconError, ValueError):
    """A conflict severity outside (-1, 0]."""


class ProbeError(ReconError, RuntimeError):
    """Losses whose gradients cannot be told apart per task; the message says which and why."""


class ProblemError(ReconError, ValueError):
    """A problem definition that cannot be trained; the message lists every fault found."""


class DataError(ReconError, ValueError):
    """A data file that is missing, damaged, or not what its name says."""


class ConfigError(ReconError, ValueError):
    """Options that cannot be used together, or a file of options that cannot be read; every fault is listed."""


class RunError(ReconError, ValueError):
    """A run folder that exists, is damaged, or does not fit the request."""


class MissingExtraError(ReconError, ImportError):
    """An optional dependency that is not installed; the message has the line that installs it."""


def missing_extra(what: str, extra: str) -> MissingExtraError:
    """The error for something that needs one of the package's extras.

    Args:
        what: What was asked for, e.g. "The metrics of dense tasks".
        extra: The extra's name in pyproject.toml.
    """
    return MissingExtraError(f'{what}: this takes optional packages. Install them: pip install "reconmtl[{extra}]"')


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came while a training ran; its state is saved where it has a folder.

    Attributes:
        signal: Which one.
        saved: What is kept and how to go on, one sentence; empty if nothing is.
    """

    def __init__(self, signal: Signals, saved: str = "") -> None:
        super().__init__(f"Interrupted by {signal.name}. {saved}".strip())
        self.signal = signal
        self.saved = saved

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Signals, str]]:
        return Interrupted, (self.signal, self.saved)  # from a worker process to its parent


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what exists instead of `name`: the nearest names first, else all of them; ends with a full stop."""
    names = list(dict.fromkeys(known))
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "Nearest: " + ", ".join(repr(n) for n in close) + "."
    if not names:
        return "There is none."
    shown = ", ".join(repr(n) for n in names[:20])
    return f"Known: {shown}{', ...' if len(names) > 20 else ''}."
