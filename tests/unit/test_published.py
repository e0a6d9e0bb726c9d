"""The paper's tables: what can be recomputed from them is, so a slip in typing would show."""

import math
from collections.abc import Callable

import pytest

from reconmtl.errors import UnknownNameError
from reconmtl.paper.published import (
    CUTS,
    DISTRIBUTIONS,
    JOINT,
    RESULTS,
    SINGLE,
    TITLES,
    Printed,
    agreement,
    distances,
    distributions,
    drops,
    falling,
    load,
    recompute,
    reduction,
    results,
    text,
)


def test_every_table_is_there_and_every_cell_is_a_number_or_nothing() -> None:
    assert list(TITLES) == [f"t{i}" for i in range(1, 17)]
    for name in TITLES:
        table = load(name)
        assert all(len(row) == len(table.columns) for row in table.rows), name
        named = {"method", "ranking", "balancer", "selection", "from", "to"}
        for row in table.dicts():
            for column, cell in row.items():
                assert column in named or not cell or math.isfinite(float(cell)), (name, column, cell)


@pytest.mark.parametrize(
    ("name", "printed", "agree", "differ"),
    [
        ("t1", 14, 14, []),
        ("t3", 12, 11, ["PCGrad"]),
        ("t4", 12, 12, []),
        ("t5", 11, 0, None),
        ("t13", 5, 5, []),
        ("t15", 15, 14, ["CAGrad"]),
        ("t16", 15, 14, ["PCGrad"]),
    ],
)
def test_delta_m_follows_from_the_printed_metrics(
    name: str, printed: int, agree: int, differ: list[str] | None
) -> None:
    values = recompute(name)
    assert (len(values), sum(v.agrees for v in values)) == (printed, agree)
    if differ is not None:
        assert [v.method for v in values if not v.agrees] == differ
    assert all(v.low <= v.value <= v.high for v in values)


def test_table_5_has_the_single_task_row_of_table_15_and_misses_by_about_0_4() -> None:
    for task, named in results("t5")[0][0].metrics.items():
        for metric, value in named.items():
            assert abs(value.value - results("t15")[0][0].metrics[task][metric].value) <= value.half_unit
    assert all(0.37 < v.value - v.printed.value < 0.59 for v in recompute("t5"))


def test_all_44_reductions_follow_from_the_printed_shares() -> None:
    gaps = []
    for name in DISTRIBUTIONS:
        joint, *others = distributions(name)
        assert joint.method == JOINT and joint.reduction is None and falling(joint.edges)
        for d in others:
            assert d.reduction is not None
            gaps.append(abs(reduction(joint.tail(CUTS[name]), d.tail(CUTS[name])) - d.reduction))
    assert len(gaps) == 44
    assert max(gaps) < 0.035


def test_columns_that_do_not_add_up() -> None:
    odd = {
        (n, d.method): sum(d.shares) for n in DISTRIBUTIONS for d in distributions(n) if abs(sum(d.shares) - 100) > 0.05
    }
    assert {k: round(v, 2) for k, v in odd.items()} == {
        ("t6", JOINT): 100.37,
        ("t10", f"{JOINT} w/ RSL"): 95.79,
        ("t10", f"{JOINT} w/ RSP"): 95.78,
    }


def test_performance_drops() -> None:
    assert len(drops("t7")) == 24
    assert all(abs(printed - value) < 0.0101 for _, _, printed, value in drops("t7"))
    wrong = {
        (row["balancer"], row["selection"], task): round(value, 2)
        for row, task, printed, value in drops("t11")
        if abs(printed - value) > 0.0101
    }
    assert wrong == {
        ("PCGrad", "last", "digit"): 0.67,
        ("PCGrad", "last", "fashion"): 0.79,
        ("PCGrad", "first", "digit"): 0.11,
        ("PCGrad", "first", "fashion"): 0.26,
    }


def test_distances_and_the_sentences_about_them() -> None:
    stages, methods = distances("t12"), distances("t14")
    assert len(stages) == len(methods) == 10
    assert max(stages.values()) == 2.39 < float(text("distance of stages below")[0][0])
    assert max(methods.values()) == 1.90 == float(text("distance of methods below")[0][0])  # "less than 1.9"
    # Eq. 22 is a metric, and so are its rounded values
    for of in (stages, methods):
        names = {n for pair in of for n in pair}
        d = of | {(b, a): v for (a, b), v in of.items()} | {(n, n): 0.0 for n in names}
        assert all(d[a, c] <= d[a, b] + d[b, c] + 0.015 for a in names for b in names for c in names)


def test_rows_that_tables_have_in_common() -> None:
    """Table 13's first row is Table 3's joint training w/ Recon; Table 7 and 11 repeat Table 1's w/ Recon."""
    three = {r.method: r for r in results("t3")[0]}
    thirteen = {r.method: r for r in results("t13")[0]}
    assert thirteen[SINGLE].metrics == three[SINGLE].metrics
    assert thirteen["1st 25% Iterations"].metrics == three[f"{JOINT} w/ Recon"].metrics
    one = {r.method: r for r in results("t1")[0]}
    for name in ("t7", "t11"):
        for row in load(name).dicts():
            if row["selection"] == "Recon":
                for task in ("digit", "fashion"):
                    assert float(row[f"{task} acc"]) == one[f"{row['balancer']} w/ Recon"].metrics[task]["acc"].value


def test_a_printed_number_is_as_exact_as_its_column() -> None:
    assert (Printed.of("0.0128").low, Printed.of("0.0128").high) == pytest.approx((0.01275, 0.01285))
    assert Printed.of("0.02", digits=4).half_unit == Printed.of("0.0200").half_unit
    assert Printed.of("24.8683", digits=2).half_unit == pytest.approx(0.00005)
    assert tuple(n for n in TITLES if "delta_m" in load(n).columns and n != "t2") == RESULTS


@pytest.mark.parametrize("call", [lambda: load("t17"), lambda: results("t6"), lambda: distributions("t1")])
def test_unknown_tables_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(UnknownNameError, match="no table"):
        call()


@pytest.mark.parametrize(
    ("ours", "printed", "said"),
    [
        (2.0, 3.0, "sign and size"),
        (-1.0, -2.0, "sign and size"),
        (9.0, 3.0, "sign"),
        (-0.1, 0.1, "no"),
        (None, 1.0, ""),
    ],
)
def test_agreement_is_of_sign_then_of_size_within_a_factor_of_two(
    ours: float | None, printed: float, said: str
) -> None:
    assert agreement(ours, printed) == said
    assert agreement(math.nan, printed) == agreement(ours, None) == ""
