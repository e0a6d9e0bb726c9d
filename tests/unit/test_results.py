"""The page of results: what it says follows from the runs that are there."""

from pathlib import Path

import pytest

from reconmtl.paper.results import document, pages

RUNS = Path(__file__).parents[2] / "results" / "paper"


def test_without_runs_the_page_has_no_experiments(tmp_path: Path) -> None:
    assert pages(tmp_path) == []
    assert "## " not in document(tmp_path)


@pytest.mark.slow
def test_the_committed_page_is_made_of_the_committed_runs() -> None:
    committed = (RUNS.parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    made = document(RUNS)
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert rows and all(line in committed for line in rows)
