"""Tables of what was found, against distributions made by hand."""

import torch
from torch import Tensor

from reconmtl.comparing import compare
from reconmtl.conflicts import TABLE_EDGES, ConflictLog
from reconmtl.nulls import excess
from reconmtl.plan import Plan
from reconmtl.reporting.tables import conflicts_table, layers_table, summary
from reconmtl.runs import Run

MIDDLES = (0.5, -0.005, -0.015, -0.025, -0.5)
"""A cosine inside each interval of the paper's Table 6."""


def log_of(cosines: Tensor) -> ConflictLog:
    """A log of unit gradients with these cosines, [steps, layers]."""
    ones = torch.ones_like(cosines)
    names = [f"layer{i}" for i in range(cosines.shape[1])]
    return ConflictLog(
        torch.stack([ones, cosines, ones], dim=2),
        tasks=["a", "b"],
        layers=names,
        sizes={n: 10 ** (i + 3) for i, n in enumerate(names)},
        types=dict.fromkeys(names, "Linear"),
    )


def run(label: str, counts: tuple[int, ...] | None, seed: int = 0) -> Run:
    log = None
    if counts is not None:
        log = log_of(torch.tensor([m for m, n in zip(MIDDLES, counts, strict=True) for _ in range(n)])[:, None])
    return Run(
        method="single" if label == "single-task" else "joint",
        label=label,
        seed=seed,
        metrics={"a": {"acc": 90.0}},
        directions={"a": {"acc": "max"}},
        parameters=1000,
        seconds=1.0,
        fingerprint="f",
        network="Net",
        log=log,
    )


def test_the_conflicts_are_those_of_a_distribution_made_by_hand() -> None:
    # Joint: 20 of 100 pairs below -0.01, half of them in each seed's own way; Recon: 5 of 50, that is 10 %.
    runs = [
        run("single-task", None),
        run("joint", (30, 10, 6, 4, 0), seed=0),
        run("joint", (10, 30, 0, 4, 6), seed=1),
        run("joint w/ Recon", (40, 5, 1, 2, 2)),
    ]
    table = conflicts_table(compare(runs).rows)
    assert table is not None
    assert table.split("\n") == [
        "| cos of the whole shared gradient | joint | joint w/ Recon |",
        "|----------------------------------|------:|---------------:|",
        "| [1, 0]                           | 40.00 |          80.00 |",
        "| (0, -0.01]                       | 40.00 |          10.00 |",
        "| (-0.01, -0.02]                   |  6.00 |           2.00 |",
        "| (-0.02, -0.03]                   |  8.00 |           4.00 |",
        "| (-0.03, -1]                      |  6.00 |           4.00 |",
        "| reduction below -0.01 (%)        |     - |           50.0 |",
    ]


# The paper's Table 6, in hundredths of a percent: the last four intervals, and the reduction as printed. The first one
# is what is left of 100 % (the printed joint column sums to 100.37 %).
TABLE_6 = {
    "joint": ((3125, 926, 205, 125), None),
    "w/ RSL": ((2735, 1345, 418, 158), -52.94),
    "w/ RSP": ((3433, 638, 80, 34), 40.13),
    "w/ Recon": ((3767, 304, 50, 25), 69.82),
    "MGDA": ((3236, 887, 171, 100), 7.80),
    "MGDA w/ Recon": ((4093, 212, 26, 18), 79.62),
    "CAGrad": ((3125, 937, 200, 120), -0.08),
}


def test_reductions_are_those_of_the_papers_table_6() -> None:
    table = conflicts_table(compare([run(n, (10000 - sum(of), *of)) for n, (of, _) in TABLE_6.items()]).rows)
    assert table is not None
    cells = [cell.strip() for cell in table.split("\n")[-1].split("|")[2:-1]]
    assert cells == ["-", *(f"{printed:.1f}" for _, printed in TABLE_6.values() if printed is not None)]


def test_nothing_recorded_and_no_reference_and_no_tail_are_no_errors() -> None:
    assert conflicts_table(compare([run("joint", None)]).rows) is None
    alone = conflicts_table(compare([run("joint w/ Recon", (1, 1, 1, 1, 1))]).rows)
    assert alone is not None and "reduction" not in alone and alone.count("20.00") == 5
    calm = conflicts_table(compare([run("joint", (5, 5, 0, 0, 0)), run("x", (1, 1, 1, 1, 1))]).rows)
    assert calm is not None and calm.split("\n")[-1].split("|")[2:4] == ["     - ", "     - "]
    one_edge = conflicts_table(compare([run("joint", (5, 0, 0, 0, 5))]).rows, edges=(0.0,))
    assert one_edge is not None and one_edge.count("50.00") == 2 and "reduction" not in one_edge
    assert len(TABLE_EDGES) + 1 == len(MIDDLES)


def test_chosen_layers_are_listed_with_their_rank_and_how_often_they_conflict() -> None:
    log = log_of(torch.tensor([[0.5, -0.5, -0.5], [0.5, -0.5, 0.5], [0.5, -0.5, -0.5], [0.5, -0.05, 0.5]]))
    ranking = log.rank(severity=-0.1)
    plan = Plan(tasks=["a", "b"], layers=["layer1", "layer0"])
    assert layers_table(ranking, plan).split("\n") == [
        "| layer  | rank |   type | parameters | conflicts | % of pairs |",
        "|--------|-----:|-------:|-----------:|----------:|-----------:|",
        "| layer1 |    1 | Linear |     10,000 |         3 |       75.0 |",
        "| layer0 |    3 | Linear |      1,000 |         0 |        0.0 |",
    ]
    comparison = compare([run("joint", (1, 1, 1, 1, 1)), run("joint", (2, 2, 2, 2, 2), seed=1), run("x", None)])
    text = summary(comparison, ranking, plan, ["n = 2", "a caveat"])
    parts = text.split("\n\n")
    assert parts[0] == str(comparison) and parts[1] == "n = 2\na caveat"
    assert parts[2] == conflicts_table(comparison.rows) and parts[3] == "Measured steps per seed: joint 10."
    assert parts[4] == "Layers chosen by the probe (S = -0.1, 4 measured gradient pairs per layer):"
    assert parts[5] == layers_table(ranking, plan) and len(parts) == 6


def test_shares_are_of_the_pairs_that_were_measured_and_noise_is_marked() -> None:
    cosines = torch.tensor([[-0.5, -0.5, torch.nan], [-0.5, 0.5, torch.nan], [torch.nan, 0.5, torch.nan]])
    log = log_of(cosines)
    log.grams[:, 1] *= 1e-14
    ranking = log.rank(severity=-0.1)
    plan = Plan(tasks=["a", "b"], layers=["layer0", "layer1", "layer2"])
    assert layers_table(ranking, plan).split("\n")[2:] == [
        "| layer0                  |    1 | Linear |      1,000 |         2 |      100.0 |",
        "| layer1 (rounding noise) |    2 | Linear |     10,000 |         1 |       33.3 |",
        "| layer2                  |    3 | Linear |    100,000 |         0 |        n/a |",
    ]
    text = summary(compare([run("joint", None)]), ranking, plan, ["n = 1"])
    assert "(S = -0.1, 0 to 3 measured gradient pairs per layer):" in text


def test_a_training_without_a_measured_pair_has_no_distribution() -> None:
    table = conflicts_table(compare([run("joint", (0, 0, 0, 0, 0)), run("x", (1, 1, 1, 1, 1))]).rows)
    assert table is not None and "nan" not in table and table.count(" n/a |") == 6


def test_beside_the_score_stands_what_chance_gives_and_the_rank_without_it() -> None:
    torch.manual_seed(0)
    scatter = 0.45 * torch.randn(100, 1).clamp(-2, 2)
    log = log_of(torch.cat([scatter, -0.2 + 0.01 * torch.randn(100, 1)], 1))
    ranking, found = log.rank(severity=-0.1), excess(log, severity=-0.1)
    header, _, *rows = layers_table(ranking, ranking.top(2), found).split("\n")
    titles, *cells = ([c.strip() for c in line.split("|")[1:-1]] for line in (header, *rows))
    assert titles[-4:] == ["by chance (%)", "beyond", "p", "rank beyond"]
    for line in cells:
        i = found.layers.index(line[0])
        assert line[-4:-1] == [f"{100 * found.chance[i]:.1f}", f"{100 * found.excess[i]:+.1f}", f"{found.p[i]:.3f}"]
        assert found.order[int(line[-1]) - 1] == line[0]
