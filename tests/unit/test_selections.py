"""Tables 7 and 11: drops against Recon are over the seeds that both rows have, the paper's over all it prints."""

import pytest

from reconmtl.comparing import compare
from reconmtl.paper.prices import Priced
from reconmtl.paper.published import load
from reconmtl.paper.selections import drops
from studies import accuracies


def test_drops_are_over_common_seeds_and_beside_the_papers_means() -> None:
    values = {"recon": {0: 44.0, 1: 50.0}, "random": {0: 42.0, 2: 10.0}, "larger": {0: 45.0, 1: 47.0}, "late": {5: 1.0}}
    rows = compare([run for label, of in values.items() for run in accuracies(label, of)], baseline="recon").rows
    found = [Priced(row, row.delta_m, None, 0.0, 1.0) for row in rows if row.delta_m is not None]
    published = {"table": "t7", "Recon": "recon", "RSL": "random", "RSP": "larger", "last": "late"}
    told = drops(found, published)
    assert [(s, label, task, d.mean, d.n) for s, label, task, d, _ in told] == [
        ("RSL", "random", "digit", 2, 1),
        ("RSL", "random", "fashion", 2, 1),
        ("RSP", "larger", "digit", 1, 2),
        ("RSP", "larger", "fashion", 1, 2),
    ]
    of_rsl = [float(row["digit drop"]) for row in load("t7").dicts() if row["selection"] == "RSL"]
    assert len(of_rsl) == 6 and told[0][4] == pytest.approx(sum(of_rsl) / 6)
