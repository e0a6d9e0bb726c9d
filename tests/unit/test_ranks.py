import pytest

from reconmtl.ranks import Ranks, started


def test_alone_everything_stays_as_it_is() -> None:
    ranks = Ranks()
    assert ranks.sum([1.5, 2]) == [1.5, 2]
    assert ranks.first(lambda: 3) == 3
    assert ranks.gather("a") == ["a"]
    ranks.share([])


@pytest.mark.parametrize(("value", "expected"), [("", 1), ("2", 2), ("0", 1), ("many", 1)])
def test_the_number_of_processes_is_torchruns(value: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert started() == expected
