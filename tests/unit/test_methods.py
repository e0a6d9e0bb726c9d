"""The comparison in words and as a table, against rows made by hand."""

from dataclasses import replace

from reconmtl.comparing import compare
from reconmtl.reporting.methods import best_rows, conclusion, gains, table
from reconmtl.runs import Run


def run(label: str, accuracy: float, error: float = 1.0, seed: int = 0, parameters: int = 2**20) -> Run:
    return Run(
        method="single" if label == "single-task" else "joint",
        label=label,
        seed=seed,
        metrics={"a": {"acc": accuracy, "err": error}},
        directions={"a": {"acc": "max", "err": "min"}},
        parameters=parameters,
        seconds=1.0,
        fingerprint="f",
        network="Net",
    )


ROWS = [run("single-task", 80), run("joint", 60), run("joint w/ Recon", 88, 0.8, parameters=2**20 * 3 // 2)]


def test_the_best_of_each_column_knows_its_direction() -> None:
    assert best_rows(compare(ROWS)) == {1: {2}, 2: {2}, 3: {2}}
    assert best_rows(compare([run("x", 1, 5), run("y", 1, 9)])) == {1: {0, 1}, 2: {0}}


def test_the_conclusion_names_the_best_and_what_it_costs() -> None:
    # single 80 / 1: Recon gains (10 % + 20 %) / 2 = 15 %, joint loses (25 % + 0 %) / 2 = 12.5 %
    assert conclusion(compare(ROWS)).replace("\u00a0", " ") == (
        "The largest gain is that of joint w/ Recon: Δm +15.00 % relative to single-task, 27.50 points above joint "
        "training (\u221212.50 %), one seed says nothing about the spread; it has 50.0 % more parameters than joint."
    )
    seeds = [
        replace(r, seed=s, metrics={"a": {"acc": r.metrics["a"]["acc"] + s, "err": 1.0}}) for r in ROWS for s in (0, 1)
    ]
    assert "more than their spread over seeds (±" in conclusion(compare(seeds))
    noisy = [replace(r, seed=s, metrics={"a": {"acc": 80.0 + 9 * s, "err": 1.0}}) for r in ROWS for s in (0, 1)]
    assert "less than their spread" in conclusion(compare(noisy)) or "joint training" not in conclusion(compare(noisy))
    assert "without a single-task baseline" in conclusion(compare(ROWS[1:]))
    assert gains(compare(ROWS[1:])) is None and gains(compare(ROWS)) is not None


def test_many_metrics_stand_behind_what_sums_them_up() -> None:
    text = table(compare(ROWS)).text
    assert text.index("a acc") < text.index("Δm") < text.index("#P")
    many = [
        replace(r, metrics={"a": dict.fromkeys("pqrs", 1.0)}, directions={"a": dict.fromkeys("pqrs", "max")})
        for r in ROWS
    ]
    text = table(compare(many)).text
    assert text.index("Δm") < text.index("#P") < text.index("All 4 metrics") < text.index("a p")
    assert text.count("1.000") == 12 and 'class="best">1.000' in text
