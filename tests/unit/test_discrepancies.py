"""The page of discrepancies says what the arithmetic says, and is up to date."""

from pathlib import Path

import pytest

from reconmtl.paper.discrepancies import findings, growths, page, turned_shares

DOCS = Path(__file__).parents[2] / "docs" / "paper.md"


def test_shares_that_are_turned_and_what_they_are_shares_of() -> None:
    assert {s.what: s.reproduced() for s in turned_shares()} == {
        "multifashion": ["/ shared (cut off)", "/ joint network (cut off)"],
        "celeba": ["/ joint network (cut off)"],
        "cityscapes": [],
        "nyuv2": ["/ joint network (rounded)", "/ split network (rounded)"],
        "pascal_context": ["/ shared (rounded)"],
    }


def test_growth_of_the_networks() -> None:
    grown = growths()
    assert grown["nyuv2"] == pytest.approx(0.516, abs=0.001)
    assert grown["celeba"] == pytest.approx(57.25, abs=0.01)
    assert grown["cityscapes"] == pytest.approx(13.63, abs=0.01)
    assert grown["nyuv2, SegNet"] == pytest.approx(46.0, abs=0.1)


def test_findings_are_found_and_not_listed_by_hand() -> None:
    found = {(f.where, f.printed): f for f in findings()}
    assert found["Table 15", "Δm of CAGrad: 5.6"].found == "5.30"
    assert "0.0168 restores it" in found["Table 3", "Δm of PCGrad: -78.39"].arithmetic
    assert "0.0181 restores it" in found["Table 16", "Δm of PCGrad: -23.6"].arithmetic
    assert "against CAGrad w/ Recon it is 0.67" in found["Table 11", "PCGrad, last, fashion: drop 0.66"].arithmetic
    assert [f.found for (w, p), f in found.items() if w == "Table 7" and p.startswith("RSP")] == [
        "15.4 times as many",
        "15.0 times as many",
        "7.7 times as many",
    ]


def test_the_page_in_the_docs_is_the_one_that_is_written() -> None:
    assert DOCS.read_text(encoding="utf-8") == page()
