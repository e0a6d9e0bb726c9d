"""One table in several spellings, read back by a reader of each."""

import csv
import io
import math

from hypothesis import given
from hypothesis import strategies as st

from reconmtl.formats import LATEX, csv_text, escape, grid, latex, readable


@given(st.lists(st.lists(st.text("ab|± Δ", max_size=6), min_size=3, max_size=3), max_size=4))
def test_every_line_of_a_grid_is_as_wide_as_the_others(rows: list[list[str]]) -> None:
    lines = grid(["x", "yy", "z|z"], rows).split("\n")
    assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1
    for line, cells in zip(lines[2:], rows, strict=True):
        parts = line.replace("\\|", "\0").split("|")[1:-1]
        assert [p.strip().replace("\0", "|") for p in parts] == [c.strip() for c in cells]
        assert parts[0].startswith(" " + cells[0].replace("|", "\0")) and parts[1].endswith(
            cells[1].replace("|", "\0") + " "
        )


@given(st.lists(st.lists(st.text('ab,"\n ±', max_size=6), min_size=2, max_size=2), max_size=4), st.floats(0.1, 1e300))
def test_csv_is_read_back_as_it_was_and_numbers_lose_no_digit(rows: list[list[str]], number: float) -> None:
    table: list[list[object]] = [[*row] for row in rows]
    table += [[number, "x"], [math.nan, None]]
    back = list(csv.reader(io.StringIO(csv_text(["a", "b"], table) + "\n")))
    assert back == [["a", "b"], *rows, [repr(number), "x"], ["", ""]]


def test_latex_has_no_character_left_that_means_something() -> None:
    for sign in "&%$#_{}~^\\<>±↑↓Δ":
        assert escape(f"a{sign}b") == f"a{LATEX[sign]}b"
    assert escape("Δm (%) ↑") == r"$\Delta m$ (\%) $\uparrow$"
    assert latex(["a", "b"], [["x_1", "2"]]).split("\n") == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a & b \\",
        r"\midrule",
        r"x\_1 & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert [readable(x, digits=2, sign=True) for x in (-0.004, 0.004, -0.006)] == ["+0.00", "+0.00", "-0.01"]
