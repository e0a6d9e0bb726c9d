"""Tables of results beside the paper's: which rows there are, what stands beside them, and what agrees."""

from pathlib import Path

import pytest

from reconmtl.comparing import compare
from reconmtl.paper import tables
from reconmtl.paper.published import SINGLE
from reconmtl.paper.trainings import Setup, Training, run_all
from reconmtl.plan import Plan
from reconmtl.runs import Run


def run(label: str, digit: float, fashion: float, *, layers: tuple[str, ...] = (), seed: int = 0) -> Run:
    return Run(
        method="single" if label == SINGLE else "joint",
        label=label,
        seed=seed,
        metrics={"digit": {"acc": digit}, "fashion": {"acc": fashion}},
        directions={"digit": {"acc": "max"}, "fashion": {"acc": "max"}},
        parameters=1000,
        seconds=1.0,
        fingerprint="f",
        network="Net",
        plan=Plan(tasks=["digit", "fashion"], layers=layers) if layers else None,
    )


def test_a_row_stands_beside_the_printed_one_and_gains_are_those_by_recon() -> None:
    runs = [
        run(SINGLE, 100.0, 100.0),
        run("Joint-train", 98.0, 98.0),  # delta-m -2; the paper's -0.94
        run("Joint-train w/ Recon", 99.0, 99.0),  # -1; the paper's -0.33: gains 1 and 0.61
        run("CAGrad w/ Recon", 101.0, 101.0),  # the row without Recon is missing
        run("something else", 97.0, 97.0),
    ]
    found = {b.row.label: b for b in tables.beside(compare(runs), "t1")}
    recon = found["Joint-train w/ Recon"]
    assert recon.gain is not None and recon.gain.mean == pytest.approx(1.0)
    assert recon.printed == -0.33 and recon.printed_gain == pytest.approx(0.61)
    assert recon.agrees == "sign and size"
    assert found["CAGrad w/ Recon"].gain is None and found["CAGrad w/ Recon"].agrees == ""
    assert found["something else"].printed is None and found[SINGLE].printed is None


def test_gains_are_over_the_seeds_that_both_rows_have() -> None:
    runs = [run(SINGLE, 100.0, 100.0, seed=seed) for seed in range(3)]
    runs += [run("PCGrad", value, value, seed=seed) for seed, value in enumerate((90.0, 94.0, 60.0))]
    runs += [run("PCGrad w/ Recon", value, value, seed=seed) for seed, value in ((0, 92.0), (1, 97.0))]
    (found,) = (b.gain for b in tables.beside(compare(runs), "t1") if b.gain is not None)
    assert (found.mean, found.sd, found.n) == pytest.approx((2.5, 0.5**0.5, 2))  # 2 and 3; the third seed is alone


def test_methods_with_a_network_of_their_own_have_rows_with_and_without_recon() -> None:
    rows = tables.others("mmoe", "rotograd:m=1024", recon_too=("mmoe",), network="segnet")
    assert list(rows) == ["MMoE", "MMoE w/ Recon", "RotoGrad"]
    assert rows["RotoGrad"].method == "rotograd:m=1024" and rows["MMoE"].choose is None
    assert rows["MMoE w/ Recon"].choose is not None and rows["MMoE w/ Recon"].options == {"network": "segnet"}
    every = tables.rows(cagrad=0.4, others=rows, elsewhere=lambda _setup, _log, _seed: Plan(tasks="ab", layers=["x"]))
    assert list(every)[-3:] == list(rows) and every["CAGrad w/ Recon*"].balancer == "cagrad:c=0.4"
    assert len({t.row for t in every.values()}) == len(every)  # a folder each


@pytest.mark.slow
def test_an_architecture_s_layers_are_searched_on_its_own_network(tmp_path: Path) -> None:
    setup = Setup.of("multifashion", "mini", tmp_path, smoke=True)
    rows = tables.others("mmoe", recon_too=("mmoe",))
    assert run_all(setup, tuple(rows.values()), (0,), lambda _: None) == []
    split = rows["MMoE w/ Recon"].finished(setup, 0)
    assert split is not None and split.plan is not None and len(split.plan) == 25
    assert all(name.startswith("experts.") for name in split.plan.layers)
    assert setup.probed(0, method="mmoe") and not setup.probed(0)
    assert Training(name="joint").finished(setup, 0) is None


def test_layers_in_common_are_counted_seed_by_seed() -> None:
    runs = [
        run("Joint-train w/ Recon", 1.0, 1.0, layers=("a", "b", "c")),
        run("Joint-train w/ Recon*", 1.0, 1.0, layers=("c", "d", "a")),
        run("Joint-train w/ Recon", 1.0, 1.0, layers=("a",), seed=1),
    ]
    (told,) = tables._in_common(runs)
    assert "2 of 3 (seed 0)." in told
    assert tables._in_common(runs[:1]) == []
