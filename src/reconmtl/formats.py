"""One table in several spellings: Markdown that also reads well in a terminal, CSV, LaTeX; and numbers for cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "Δm": r"$\Delta m$",
    "Δ": r"$\Delta$",
}


def readable(value: float, *, digits: int | None = None, size: float | None = None, sign: bool = False) -> str:
    """A number for a table; 'n/a' for NaN.

    Args:
        value: The number.
        digits: Decimals; None takes as many as show four significant digits, at least two.
        size: The number whose significant digits are meant, if it is another one.
        sign: Whether positive numbers have a sign too.
    """
    if math.isnan(value):
        return "n/a"
    size = abs(value) if size is None else size
    if digits is None and 0 < size < 1e-4:
        return f"{value:{'+' if sign else ''}.3e}"
    if digits is None:
        digits = max(2, 3 - math.floor(math.log10(size))) if 0 < size < math.inf else 2
    return f"{value:{'+' if sign else ''}z.{digits}f}"  # z: no negative zero


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table as Markdown that also reads well in a terminal: the first column left, the others right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(r) for r in rows)])


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A LaTeX `tabular` with the rules of `\usepackage{booktabs}`: the first column left, the others right."""
    lines = [" & ".join(map(escape, cells)) + r" \\" for cells in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX.get(c, c) for c in text.replace("Δm", "\0")).replace("\0", LATEX["Δm"])


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a header, as RFC 4180 has them; None and NaN are empty, numbers lose no digit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in row])
    return out.getvalue().rstrip("\n")
