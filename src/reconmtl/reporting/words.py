"""Numbers and lists as they stand in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reconmtl.reporting.markup import Html, join, tag


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: Of the link to it.
        short: Its name among the links.
        title: Its heading.
        body: The plot; None if there is nothing to draw.
        conclusion: What the plot shows, or why there is none; computed.
        command: What to do next.
        purpose: What that is for.
        reading: How to read it, in plain words.
    """

    key: str
    short: str
    title: str
    body: Html | None
    conclusion: str
    command: str
    purpose: str
    reading: str


def plural(n: int, what: str) -> str:
    """E.g. '1 layer', '1,200 layers'."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def percent(value: float, *, digits: int = 1) -> str:
    """A share as percent; n/a for NaN."""
    return "n/a" if math.isnan(value) else f"{100 * value:,.{digits}f}\u00a0%"


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """E.g. 'a, b and c', 'a, b, c and 4 more'."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most:,} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def minus(text: str) -> str:
    """The same text with minus signs as long as a plus; hyphens in names stay."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)


def signed(value: float, digits: int = 2) -> str:
    """A number with a sign, with a minus as long as a plus."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def common(names: Sequence[str]) -> str:
    """The dotted beginning that all names have, with its last dot; '' if there is none."""
    parts = [name.split(".")[:-1] for name in names]
    kept = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        kept.append(column[0])
    return ".".join([*kept, ""]) if kept and len(names) > 1 else ""


def shortened(names: Sequence[str], *, most: int = 36) -> list[str]:
    """Names without their common beginning, and with dots in the middle of what is still too long: both ends tell."""
    start = len(common(names))
    out = []
    for name in names:
        short = name[start:]
        head = most // 3
        out.append(short if len(short) <= most else f"{short[:head]}\u2026{short[head + 1 - most :]}")
    return out


def fitting(names: Sequence[str], *, wide: int = 36, narrow: int = 16) -> list[Html]:
    """Shortened names for wide and for narrow screens; the page's style shows one of the two."""
    pairs = zip(shortened(names, most=wide), shortened(names, most=narrow), strict=True)
    return [
        tag("bdi", a) if a == b else join(tag("bdi", a, cls="wide-only"), tag("bdi", b, cls="narrow-only"))
        for a, b in pairs
    ]
