"""What the page of results says follows from the numbers that it is given."""

import math

from reconmtl.comparing import Spread
from reconmtl.paper.answers import Answered, Claim, answer, by_first_layer, disagreements


def row(mean: float, *, mb: float = 0.5, p: float | None = 0.01, n: int = 8) -> Answered:
    return Answered(Spread(mean, 0.5, n), mb, p)


ROWS = {
    "joint": row(0.0, mb=0.0),
    "recon": row(8.0, mb=0.02, p=None),
    "random layers": row(6.0, p=0.2),
    "all norms": row(5.0),
    "wider, parameters": row(1.0),
    "wider, operations": row(0.5, p=0.25, n=3),
    "recon (shared statistics)": row(7.0, p=None, n=3),
    "random layers (shared statistics)": row(-30.0, n=3),
}


def test_the_answer_is_three_sentences_with_the_numbers() -> None:
    text = answer(ROWS)
    assert text.count(". ") == 2
    first, second, third = text.split(". ")
    assert "Recon's layers gains +8.0 ± 0.5 Δm over joint training for 0.020 MB (n = 8)" in first
    assert "*random layers* +6.0 ± 0.5 for 0.500 MB (n = 8, p = 0.2)" in first
    assert "better than *all norms*, *wider, parameters*, and not than *random layers* (" in second
    assert "(too few seeds to tell: *wider, operations*);" in second
    assert "*random layers*, has 75 % of its gain" in second and "adds +2.0 Δm" in second
    assert "lead over random layers is 37.0 Δm there and 2.0 with statistics per task" in third


def test_what_wins_against_recon_is_not_said_to_lose() -> None:
    text = answer(ROWS | {"random layers": row(9.0, p=0.001)})
    assert "not than *random layers* (" in text and "has 112 % of its gain" in text and "adds -1.0 Δm" in text


def test_too_little_gives_no_answer_and_no_third_sentence() -> None:
    assert answer({}) == "" and answer({"recon": ROWS["recon"], "joint": ROWS["joint"]}) == ""
    fewer = {n: r for n, r in ROWS.items() if "shared" not in n}
    assert "published" not in answer(fewer)


def test_what_the_first_layer_does_is_said_once_all_of_it_is_known() -> None:
    assert by_first_layer(ROWS) == ""
    first = {"first layer alone": row(4.0, mb=0.001), "recon but the first layer": row(5.0)}
    text = by_first_layer(ROWS | first | {"random layers and the first": row(7.5, p=0.4)})
    assert "*first layer alone* +4.0 ± 0.5 for 0.001 MB (n = 8, p = 0.01)" in text
    assert "*recon but the first layer* +5.0" in text and "against +8.0 ± 0.5 of *recon*" in text
    assert "*random layers and the first* +7.5" in text and "against +6.0 ± 0.5 of *random layers*" in text


def test_every_number_that_does_not_agree_is_listed() -> None:
    claims = [
        Claim("same", Spread(1.5, 0.1, 3), 1.0),
        Claim("larger", Spread(4.0, 0.5, 3), 1.0),
        Claim("turned", Spread(-2.0, math.nan, 1), 1.0),
        Claim("near", Spread(2.0, 0.1, 3), 1.5, signed=False),
        Claim("far", Spread(2.0, 0.1, 3), 0.5, signed=False),
        Claim("unknown", Spread(math.nan, math.nan, 1), 1.0),
    ]
    text = disagreements({"t1": claims, "t2": []})
    table, listed = text.split("What does not agree")
    assert "| t1         |       5 |     2 |            1 |          2 |" in table and "t2" not in table
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in listed.splitlines() if "t1" in line]
    assert [line[1] for line in lines] == ["turned", "far", "larger"]
    assert lines[0][2:] == ["-2.00", "1", "+1.00", "no", ""] and lines[1][2:] == [
        "2.00 ± 0.10", "3", "0.50", "no", "15.0",
    ]  # fmt: skip
    assert lines[2][-2:] == ["sign", "6.0"]
    assert disagreements({"t2": []}) == ""
