"""The problem cityscapes: it passes its check and trains, and says what it needs."""

from pathlib import Path

import pytest

from dense import assert_checks_and_trains, assert_says_what_it_needs
from reconmtl.problems import cityscapes


@pytest.mark.filterwarnings("ignore:.*published are:UserWarning")
@pytest.mark.parametrize("network", ["segnet", pytest.param("mtan", marks=pytest.mark.slow)])
def test_the_problem_passes_its_check_and_trains(network: str, tmp_path: Path) -> None:
    assert_checks_and_trains(cityscapes, "cityscapes", network, tmp_path)


def test_without_a_folder_it_is_said_where_to_get_it() -> None:
    assert_says_what_it_needs(cityscapes)
