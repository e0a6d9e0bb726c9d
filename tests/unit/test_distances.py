"""Tables of distances between rankings, beside printed ones."""

from reconmtl.paper.distances import PASSES, table
from reconmtl.ranking import Ranking


def ranking(scores: dict[str, int]) -> Ranking:
    found = Ranking.__new__(Ranking)
    found.layers = tuple(sorted(scores, key=lambda n: -scores[n]))
    found.scores = tuple(scores[n] for n in found.layers)
    return found


def test_a_row_per_pair_with_distance_tau_and_the_printed_number() -> None:
    first, second = ranking({"a": 3, "b": 2, "c": 1}), ranking({"a": 1, "b": 2, "c": 3})
    text = table([{"one": first, "two": second}, {"one": first, "two": first}], {("two", "one"): 1.25})
    (row,) = [line for line in text.splitlines() if line.startswith("| two - one")]
    # reversed: positions move by 2, 0 and 2, tau is -1; equal: 0 and 1; so mean 0.67 and 0
    assert "0.67" in row and "1.25" in row and "0.00" in row and row.rstrip(" |").endswith("2")
    assert "joint" in PASSES.values()
    assert [c.strip() for c in row.split("|")][4] == "size"  # 0.67 and 1.25 are within a factor of two
    far = table([{"one": first, "two": second}], {("two", "one"): 0.5})
    assert [c.strip() for c in far.splitlines()[2].split("|")][4] == "no"
