"""Delta-m against the paper's own tables; what may stand side by side and what may not."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reconmtl.comparing import Spread, compare, delta_m
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import RunError
from reconmtl.plan import Plan
from reconmtl.runs import Run, Values
from reconmtl.significance import Paired

BEST: dict[str, dict[str, Literal["max", "min"]]] = {"digit": {"acc": "max"}, "depth": {"abs": "min", "rel": "min"}}


def run(label: str = "joint", seed: int = 0, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "method": label,
        "metrics": {"digit": {"acc": 80.0 + seed}, "depth": {"abs": 0.5, "rel": 0.2}},
        "directions": BEST,
        "parameters": 2**20,
        "seconds": 10.0,
        "fingerprint": "data",
        "network": "Net",
        "config": {"recipe": {"lr": 0.1}, "machine": {"max_batches": None}},
    }
    return Run(label=label, seed=seed, **{**values, **changes})


def log_of(cosines: list[float]) -> ConflictLog:
    """A log of one layer and two tasks whose gradients have norm 1 and 2."""
    grams = torch.tensor([[[1.0, 2 * c, 4.0]] for c in cosines], dtype=torch.float64)
    return ConflictLog(grams, tasks=["digit", "depth"], layers=["fc"], sizes={"fc": 3}, types={"fc": "Linear"})


# Delta-m. -------------------------------------------------------------------------------------------------------------

# Table 1 of the paper: Multi-Fashion+MNIST, (digit accuracy, garment accuracy, delta-m) as printed.
TABLE_1 = {
    "RotoGrad": (98.10, 88.25, -0.91),
    "BMTAS": (98.20, 89.71, -0.04),
    "Joint-train": (97.42, 88.82, -0.94),
    "Joint-train w/ Recon": (98.13, 89.26, -0.33),
    "MGDA": (95.19, 89.46, -1.71),
    "MGDA w/ Recon": (98.33, 89.28, -0.22),
    "PCGrad": (97.37, 88.68, -1.04),
    "PCGrad w/ Recon": (98.30, 89.77, 0.04),
    "GradDrop": (97.38, 88.57, -1.10),
    "GradDrop w/ Recon": (98.25, 89.51, -0.13),
    "CAGrad": (97.47, 88.85, -0.90),
    "CAGrad w/ Recon": (98.28, 89.65, -0.04),
    "MMoE": (98.27, 89.51, -0.12),
    "MMoE w/ Recon": (98.25, 89.67, -0.04),
}


@pytest.mark.parametrize("method", TABLE_1)
def test_delta_m_is_that_of_the_papers_table_1(method: str) -> None:
    t1, t2, printed = TABLE_1[method]
    best = {"digit": {"acc": "max"}, "fashion": {"acc": "max"}}
    found = delta_m(
        {"digit": {"acc": t1}, "fashion": {"acc": t2}}, {"digit": {"acc": 98.37}, "fashion": {"acc": 89.63}}, best
    )
    # Every printed number is rounded to 0.01: the accuracies move delta-m by 0.011, delta-m itself by 0.005.
    assert abs(found - printed) < 0.016


def test_lower_is_better_where_it_is_and_tasks_count_alike() -> None:
    base: Values = {"digit": {"acc": 80.0}, "depth": {"abs": 0.5, "rel": -2.0}}
    better: Values = {"digit": {"acc": 84.0}, "depth": {"abs": 0.4, "rel": -2.2}}
    # digit +5 %; depth (+20 % + 10 %) / 2 = 15 %; both: 10 %, where a mean over metrics would be 11.67 %.
    assert delta_m(better, base, BEST) == pytest.approx(10)
    assert delta_m(base, base, BEST) == 0
    worse: Values = {"digit": {"acc": 76.0}, "depth": {"abs": 0.6, "rel": -1.8}}
    assert delta_m(worse, base, BEST) == pytest.approx(-10)


def test_a_task_without_metrics_does_not_count() -> None:
    best = {"a": {"m": "max"}, "b": {}}
    assert delta_m({"a": {"m": 2.0}, "b": {}}, {"a": {"m": 1.0}, "b": {}}, best) == pytest.approx(100)


def test_everything_that_makes_delta_m_undefined_is_named() -> None:
    with pytest.raises(RunError) as caught:
        delta_m({"a": {"m": 1.0}, "b": {"m": 1.0}}, {"a": {"m": 0.0, "x": 1.0}}, {"a": {"m": "max", "n": "min"}})
    message = str(caught.value)
    for fault in (
        "metrics lack a n",
        "metrics have an unknown b m",
        "baseline lack a n",
        "baseline have an unknown a x",
        "the baseline's a m is 0",
    ):
        assert fault in message
    with pytest.raises(RunError, match="no task has a metric"):
        delta_m({}, {}, {})


# Rows. ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=5))
def test_seeds_become_mean_and_sample_deviation(values: list[float]) -> None:
    runs = [run("single", 9)]
    runs += [
        run(seed=s, metrics={"digit": {"acc": v}, "depth": {"abs": 1.0, "rel": 1.0}}) for s, v in enumerate(values)
    ]
    row = compare(runs).rows[1]
    found = row.metrics["digit", "acc"]
    assert row.seeds == tuple(range(len(values))) and found.n == len(values)
    assert found.mean == pytest.approx(mean(values))
    assert found.sd == pytest.approx(stdev(values)) if len(values) > 1 else math.isnan(found.sd)
    expected = mean(delta_m(r.metrics, runs[0].metrics, BEST) for r in runs[1:])
    assert row.delta_m is not None and row.delta_m.mean == pytest.approx(expected)


def test_delta_m_is_relative_to_the_mean_of_the_baselines_seeds() -> None:
    comparison = compare([run("joint", 0), run("single", 0), run("joint", 1), run("single", 3)])
    assert [r.label for r in comparison.rows] == ["joint", "single"] and comparison.baseline == "single"
    joint, single = (r.delta_m for r in comparison.rows)
    base = 81.5
    assert joint is not None and joint.mean == pytest.approx(mean([80 / base - 1, 81 / base - 1]) * 50)
    assert joint.sd == pytest.approx(stdev([80 / base, 81 / base]) * 50)
    assert single is not None and single.mean == pytest.approx(0)
    other = compare([run("joint"), run("recon")], baseline="recon")
    assert other.rows[0].delta_m == Spread(0.0, other.rows[0].delta_m.sd, 1)  # type: ignore[union-attr]
    assert compare([run("joint"), run("recon")]).rows[0].delta_m is None


def test_the_conflict_share_is_strictly_below_the_threshold_and_over_seeds() -> None:
    logs = {0: log_of([-0.5, -0.01, 0.3, -0.02]), 1: log_of([0.1, 0.2, 0.3, -0.02])}
    runs = [run(seed=s, log=log) for s, log in logs.items()] + [run("recon")]
    joint, recon = compare(runs, threshold=-0.01).rows
    assert joint.conflict_share is not None and joint.conflict_share.mean == pytest.approx(37.5)
    assert joint.conflict_share.sd == pytest.approx(stdev([50, 25])) and recon.conflict_share is None


def test_sizes_and_times_are_means() -> None:
    (row,) = compare([run(parameters=2**20, seconds=1), run(seed=1, parameters=3 * 2**20, seconds=2)]).rows
    assert (row.megabytes, row.seconds) == (8.0, 1.5)


def test_a_baseline_of_zero_or_no_metrics_leave_the_table_whole() -> None:
    zero = {"digit": {"acc": 0.0}, "depth": {"abs": 1.0, "rel": 1.0}}
    comparison = compare([run("single", metrics=zero), run()])
    assert all(r.delta_m is not None and math.isnan(r.delta_m.mean) for r in comparison.rows)
    assert "nan" not in str(comparison) and str(comparison).count(" n/a |") == 2
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["rows"][1]["delta_m"]["mean"] is None
    empty: dict[str, Any] = {"metrics": {"digit": {}}, "directions": {"digit": {}}}
    assert compare([run("single", **empty), run(**empty)]).rows[1].delta_m is None


# Refusals. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other"}, "data other instead of data"),
        (
            {"directions": {**BEST, "digit": {"acc": "min"}}},
            "metrics digit acc (min), depth abs (min), depth rel (min) instead of digit acc (max), depth abs",
        ),
        ({"config": {"machine": {"max_batches": 2}}}, "batches per epoch 2 instead of all"),
        ({"config": {"recipe": {"epochs": 3}}}, "epochs 3 instead of all"),
    ],
)
def test_runs_that_are_not_comparable_are_listed_and_not_mixed(changes: dict[str, Any], reason: str) -> None:
    odd = run("joint", 3, **changes)
    found = compare([run(), run(seed=1), odd])
    assert [(r.label, r.seeds) for r in found.rows] == [("joint", (0, 1))]
    (out,) = found.left_out
    assert out.run == "joint, seed 3" and out.reason.startswith(reason)
    assert str(found).endswith(f"Left out:\n- joint, seed 3: {out.reason}")
    assert found.to_dict()["left_out"] == [{"run": out.run, "reason": out.reason}]
    # What is comparable is what goes with the baseline, if one is chosen.
    other = compare([run(), replace(odd, label="mine")], baseline="mine")
    assert [r.label for r in other.rows] == ["mine"] and other.left_out[0].run == "joint, seed 0"


def test_a_run_that_is_given_twice_counts_once_and_another_of_its_seed_is_listed(tmp_path: Path) -> None:
    one, other = (replace(run(), path=tmp_path / name) for name in ("one", "other"))
    found = compare([one, one, other])
    assert found.rows[0].seeds == (0,) and [o.run for o in found.left_out] == [str(tmp_path / "other")]
    assert "the seed 0 of 'joint' is there already" in found.left_out[0].reason


def test_a_baseline_that_does_not_exist_is_named() -> None:
    with pytest.raises(RunError, match="There is no run to compare"):
        compare([])
    with pytest.raises(RunError, match=r"no run labelled 'singel'\. Nearest: 'single'.*no run labelled 'jiont'"):
        compare([run("single")], baseline="singel", against="jiont")


def planned(seed: int, **chosen: Any) -> Run:
    """A run of a plan whose layers depend on the seed; `k` of them."""
    layers = [f"layer{seed + i}" for i in range(chosen["k"])]
    plan = Plan(tasks=["digit", "depth"], layers=layers, chosen={"by": "conflict", "severity": -0.1, **chosen})
    machine = {"max_batches": None, "precision": "32-true"}
    return run("recon", seed, plan=plan, config={"recipe": {"lr": 0.1}, "norm_stats": "per-task", "machine": machine})


@pytest.mark.parametrize(
    ("other", "labels"),
    [
        (lambda: planned(2, k=3), ("K = 2", "K = 3")),
        (lambda: planned(2, k=2, severity=-0.2), ("severity = -0.1", "severity = -0.2")),
        (lambda: planned(2, k=2, by="first"), ("plan = conflict", "plan = first")),
        (lambda: replace(planned(2, k=2), plan=None), ("plan = conflict, K = 2", "kind 2")),
        (
            lambda: replace(planned(2, k=2), config=planned(2, k=2).config | {"norm_stats": "shared"}),
            ("norm_stats = per-task", "norm_stats = shared"),
        ),
        (
            lambda: replace(planned(2, k=2), config=planned(2, k=2).config | {"machine": {"precision": "bf16-mixed"}}),
            ("precision = 32-true", "precision = bf16-mixed"),
        ),
        (lambda: replace(planned(2, k=2), network="Other"), ("network = Net", "network = Other")),
    ],
)
def test_runs_that_were_trained_differently_are_rows_of_their_own(
    other: Callable[[], Run], labels: tuple[str, str]
) -> None:
    runs = [planned(0, k=2), planned(1, k=2)]
    assert len(compare(runs).rows) == 1  # probes of several seeds may choose different layers
    rows = compare([*runs, other()]).rows
    assert [r.seeds for r in rows] == [(0, 1), (2,)]
    for row, label in zip(rows, labels, strict=True):
        assert row.label in (f"recon ({label})", "recon (kind 1)", "recon (kind 2)") or label in row.label
    assert len({row.label for row in rows}) == 2


def test_random_plans_may_differ_between_seeds_and_plans_by_hand_may_not() -> None:
    assert len(compare([planned(s, k=2, by="random_layers") for s in (0, 1)]).rows) == 1
    within = [planned(0, k=2), planned(1, k=3)]
    for r in within:
        assert r.plan is not None
        r.plan.chosen.update(megabytes=0.5)
        del r.plan.chosen["k"]
    assert len(compare(within).rows) == 1  # within a budget, as many as fit
    labels = [r.label for r in compare([planned(s, k=2, by=None) for s in (0, 1)]).rows]
    assert labels == ["recon (kind 1)", "recon (kind 2)"]


def test_a_run_from_disk_may_be_another_seed_of_one_in_memory() -> None:
    here, there = ({"recipe": {"milestones": of}} for of in ((4, 6), [4, 6]))
    assert compare([run(config=here), run(seed=1, config=there)]).rows[0].seeds == (0, 1)


# Printing. ------------------------------------------------------------------------------------------------------------


def test_the_table_reads_as_the_paper_prints_it() -> None:
    def one(label: str, seed: int, **changes: Any) -> Run:
        return run(label, seed, metrics={"depth": {"abs": 0.5 + seed}}, directions={"depth": {"abs": "min"}}, **changes)

    runs = [one("single", s, seconds=12.3) for s in (0, 1)] + [one("joint", 0, log=log_of([-0.5, 0.5]))]
    assert str(compare(runs)).split("\n") == [
        "| method |   depth abs ↓ |      Δm (%) ↑ | #P (MB) | cos < -0.01 (%) ↓ | time (s) | n |",
        "|--------|--------------:|--------------:|--------:|------------------:|---------:|--:|",
        "| single | 1.000 ± 0.707 | +0.00 ± 70.71 |   4.000 |                   |       12 | 2 |",
        "| joint  |        0.5000 |        +50.00 |   4.000 |              50.0 |       10 | 1 |",
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([97.42], "97.42"),
        ([42.8145], "42.81"),
        ([5.0], "5.000"),
        ([1234.567], "1234.57"),
        ([0.00123], "0.001230"),
        ([0.004], "0.004000"),
        ([-0.0421], "-0.04210"),
        ([0.00000123], "1.230e-06"),
        ([0.0], "0.00"),
        ([80.0, 81.0], "80.50 ± 0.71"),
        ([0.00120, 0.00126], "0.001230 ± 0.000042"),
        ([-0.001, 0.001], "0.000000 ± 0.001414"),
        ([math.nan], "n/a"),
        ([math.nan, 1.0], "n/a"),
        ([math.inf, 1.0], "inf"),
    ],
)
def test_numbers_of_any_size_can_be_read(values: list[float], text: str) -> None:
    assert Spread.of(values).show() == text


def seeds(label: str, values: list[float], **changes: Any) -> list[Run]:
    """A run per value, of one task's accuracy."""
    of: dict[str, Any] = {"directions": {"a": {"acc": "max"}}, **changes}
    return [run(label, seed, metrics={"a": {"acc": v}}, **of) for seed, v in enumerate(values)]


def test_every_method_is_tested_against_the_chosen_one_over_common_seeds() -> None:
    runs = seeds("single", [50.0]) + seeds("joint", [40.0, 42.0, 41.0]) + seeds("recon", [45.0, 46.0, 44.0, 90.0])
    assert not compare(runs).tested  # nothing was chosen
    found = compare(runs, against="joint")
    single, joint, recon = found.rows
    assert found.baseline == "single" and joint.paired is None and single.paired is not None and single.paired.n == 1
    assert recon.paired == Paired.of([10.0, 8.0, 6.0])  # percent of the baseline's 50; seed 3 has no partner
    assert recon.paired_metrics == {("a", "acc"): Paired.of([5.0, 4.0, 3.0])}
    assert recon.paired is not None and recon.paired.p_flip == 0.25
    header = found.header()
    cells = dict(zip(header, found.cells()[2], strict=True))
    assert (cells["Δm - joint ↑"], cells["p (sign flip)"]) == ("+8.00 ± 2.00", "0.25")
    assert "cannot give less than 1 with n = 1, 0.25 with n = 3" in str(found)
    chosen = compare(runs, baseline="joint")
    assert (chosen.baseline, chosen.against) == ("joint", "joint")


def test_networks_are_named_where_they_differ() -> None:
    assert "network" not in compare(seeds("joint", [1.0])).header()
    both = compare(seeds("joint", [1.0]) + seeds("mtan", [2.0], network="MTAN"))
    assert both.header()[-1] == "network" and [cells[-1] for cells in both.cells()] == ["Net", "MTAN"]


def test_markdown_csv_latex_and_json_say_the_same() -> None:
    runs = seeds("a & b", [40.0, 42.0]) + seeds("c|d", [45.0, 46.0], network="Other")
    found = compare(runs, baseline="a & b")
    table = list(csv.DictReader(io.StringIO(found.to("csv"))))
    data = json.loads(found.to("json"))
    assert data == json.loads(json.dumps(found.to_dict()))
    for row, plain, line in zip(found.rows, table, data["rows"], strict=True):
        assert plain["method"] == line["label"] == row.label
        assert float(plain["a acc mean"]) == line["metrics"]["a"]["acc"]["mean"] == row.metrics["a", "acc"].mean
        assert float(plain["delta_m mean"]) == line["delta_m"]["mean"]
        assert plain["seeds"].split() == [str(s) for s in line["seeds"]] and plain["network"] == line["network"]
    assert table[0]["p_flip"] == "" and data["rows"][0]["paired"] is None
    assert float(table[1]["p_flip"]) == data["rows"][1]["paired"]["p_flip"] == 0.5
    lines = found.to("latex").split("\n")
    assert lines[4].startswith(r"a \& b & 41.00 $\pm$ 1.41 & +0.00 $\pm$ 3.45 &")
    assert all(line.count("&") - line.count(r"\&") == len(found.header()) - 1 for line in (lines[2], *lines[4:6]))
    assert lines[-1].startswith("% p is two-sided")
    assert found.to("markdown") == str(found) and r"| c\|d" in str(found)
    with pytest.raises(RunError, match="Nearest: 'latex'"):
        found.to("latx")  # type: ignore[arg-type]


def test_the_comparison_is_plain_data() -> None:
    data = json.loads(json.dumps(compare([run("single"), run(), run(seed=1)]).to_dict(), allow_nan=False))
    assert data["format"] == "reconmtl.comparison/2" and data["baseline"] == "single"
    single, joint = data["rows"]
    assert joint["metrics"]["digit"]["acc"] == {"mean": 80.5, "sd": pytest.approx(0.5**0.5), "n": 2}
    assert single["metrics"]["depth"]["rel"] == {"mean": 0.2, "sd": None, "n": 1}
    assert joint["seeds"] == [0, 1] and joint["conflict_share"] is None and joint["megabytes"] == 4
