"""HTML and SVG as text in which every string is escaped unless it was made here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass

VOID = {"br", "col", "hr", "meta", "path", "rect", "line", "circle", "polyline", "use"}


@dataclass(frozen=True)
class Html:
    """Markup that is safe to put on a page: only this module makes it from strings, by escaping them."""

    text: str

    def __str__(self) -> str:
        return self.text


Child = Html | str | None | Iterable["Child"]


def escaped(text: str) -> str:
    """Text for an element or a quoted attribute; what does not show (controls, marks of direction) becomes U+FFFD."""
    seen = "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in text)
    return html.escape(seen)


def join(*children: Child) -> Html:
    """Put pieces after one another; strings are escaped, None is nothing."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child.text)
        elif isinstance(child, str):
            parts.append(escaped(child))
        else:
            parts.append(join(*child).text)
    return Html("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """One element.

    Args:
        name: Of the element.
        *children: Inside it.
        **attributes: `cls` is class, an outer underscore is dropped and others are hyphens; None and False are left
            out, True has no value.
    """
    pieces = [name]
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.strip("_").replace("_", "-")
        if value is True:
            pieces.append(key)
        elif value is not None and value is not False:
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            pieces.append(f'{key}="{escaped(shown)}"')
    opening = f"<{' '.join(pieces)}"
    if name in VOID and not children:
        return Html(f"{opening}>" if name in ("br", "col", "hr", "meta") else f"{opening}/>")
    return Html(f"{opening}>{join(*children)}</{name}>")


def data_block(identifier: str, content: object) -> Html:
    """Data for the page's program: JSON in which no name can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, code)
    return Html(f'<script type="application/json" id="{escaped(identifier)}">{text}</script>')
