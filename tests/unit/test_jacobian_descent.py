import copy
import math
from typing import Any

import pytest
import torch

from oracles import KINDS, cagrad_objective, jacobian
from reconmtl.balance import Balancer
from reconmtl.checkpoints import pack
from reconmtl.errors import MissingExtraError, ProblemError
from reconmtl.jacobian_descent import Kept
from reconmtl.solvers import conflict_averse

aggregation, scalarization = pytest.importorskip("torchjd.aggregation"), pytest.importorskip("torchjd.scalarization")
TASKS = ("a", "b", "c")

RELATIONS = [
    ("pcgrad", aggregation.PCGrad, 1.0),
    ("imtl-g", aggregation.IMTLG, 3.0),
    ("aligned-mtl", aggregation.AlignedMTL, 3.0),
    ("aligned-mtl:scale_mode=rmse", lambda: aggregation.AlignedMTL(scale_mode="rmse"), 3.0),
    ("upgrad", aggregation.UPGrad, 3.0),
    ("dualproj", aggregation.DualProj, 3.0),
    ("mgda", lambda: aggregation.MGDA(epsilon=1e-9, max_iters=10000), 3.0),
    ("graddrop", aggregation.GradDrop, 1.0),
    ("config", aggregation.ConFIG, 1.0),
]


@pytest.mark.parametrize(("spec", "make", "factor"), RELATIONS)
def test_results_are_torchjds_times_a_factor(spec: str, make: type, factor: float) -> None:
    for seed in range(4):
        rows = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        theirs = make()(rows) * factor
        balancer = Balancer(spec, TASKS)
        torch.manual_seed(seed)
        if balancer.rule.takes == "rows":
            ours = balancer.rule.update(rows.clone(), rows[:, 0])
        else:
            ours = balancer.weights(rows @ rows.T).float() @ rows
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.norm()))


ARGUMENTS: dict[str, dict[str, Any]] = {  # of those that cannot be made without
    "CAGrad": {"c": 0.4},
    "CAGradWeighting": {"c": 0.4},
    "Constant": {"weights": torch.tensor([1.0, 2.0, 3.0])},
    "ConstantWeighting": {"weights": torch.tensor([1.0, 2.0, 3.0])},
    "COSMOS": {"lambda_": 0.5, "weights": torch.tensor([1.0, 2.0, 3.0])},
    "CRMOGMWeighting": {"weighting": aggregation.UPGradWeighting()},
    "FairGrad": {"alpha": 1.0},
    "FairGradWeighting": {"alpha": 1.0},
    "FAMO": {"shape": 3},
    "IMTLL": {"shape": 3},
    "Krum": {"n_byzantine": 0},
    "KrumWeighting": {"n_byzantine": 0},
    "NashMTL": {"n_tasks": 3},
    "PBI": {"theta": 0.5, "weights": torch.tensor([1.0, 2.0, 3.0])},
    "STCH": {"mu": 1.0},
    "TrimmedMean": {"trim_number": 1},
    "UW": {"shape": 3},
}
BASES = ("Aggregator", "GramianWeightedAggregator", "Scalarizer", "Weighting", "WeightedAggregator")
REFUSED = ("ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting")
CLASSES = [(kind, n) for kind in (aggregation, scalarization) for n in kind.__all__ if n not in BASES]


@pytest.mark.filterwarnings("ignore::UserWarning")  # cvxpy's, where it is installed
@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=lambda x: x if isinstance(x, str) else "")
def test_whatever_torchjd_offers_is_taken_as_it_is_or_refused(kind: Any, name: str) -> None:
    def make() -> Any:
        return copy.deepcopy(getattr(kind, name)(**ARGUMENTS.get(name, {})))

    try:
        theirs = make()
    except ImportError as error:
        pytest.skip(str(error))
    if name in REFUSED:
        with pytest.raises(ProblemError, match=name):
            Balancer(theirs, TASKS)
        return
    single = any(isinstance(v, torch.Tensor) for v in ARGUMENTS.get(name, {}).values())  # it may not mix types
    rows = torch.rand(3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
    given, losses = rows.to(torch.float32 if single else rows.dtype), torch.tensor([0.5, 1, 2], dtype=torch.float64)
    rule = Balancer(make(), TASKS).rule
    torch.manual_seed(1)
    if kind is scalarization:
        leaf = losses.to(given.dtype).requires_grad_()
        theirs(leaf).backward()
        expected = leaf.grad
    else:
        expected = theirs(given) if isinstance(theirs, aggregation.Aggregator) else theirs(given @ given.T) @ given
    torch.manual_seed(1)
    if rule.takes == "rows":
        found = rule.update(given.clone(), losses)
    else:
        found = rule.weights(rows @ rows.T, losses)
        found = found if rule.takes == "losses" else found.double() @ rows
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    pack(rule.state_dict(), {})  # what a checkpoint can hold


@pytest.mark.parametrize("power", [-12, 0, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_cagrad_is_torchjds_where_its_solver_is_installed(kind: str, power: int) -> None:
    """Never a worse objective, and the same direction, for gradients from 1e-12 to 1e12; its own are of size one."""
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    for tasks in (2, 3, 5, 8, 20, 40):
        for c in (0.1, 0.4, 0.9):
            rows = jacobian(tasks, tasks, kind)
            gram = rows @ rows.T
            gram /= gram.trace()
            theirs = aggregation.CAGradWeighting(c=c, norm_eps=1e-20)(torch.from_numpy(gram)).numpy()
            ours = conflict_averse(gram * 10.0 ** (2 * power), c)
            lengths = [math.sqrt(w @ gram @ w) for w in (ours, theirs)]
            # its interior point method knows the objective to 1e-8, so the direction to about the root of that
            bound = 1e-7 if kind in ("general", "alike") else 1e-5
            assert 1 - ours @ gram @ theirs / lengths[0] / lengths[1] <= bound
            changes = [w - 1 / tasks for w in (ours, theirs)]
            reached, least = (cagrad_objective(w / w.sum(), gram, c) for w in changes)
            assert reached <= least + 1e-6 * abs(least)


@pytest.mark.filterwarnings("ignore::UserWarning")  # cvxpy's, about how TorchJD states the problem
def test_nash_mtl_is_torchjds_wherever_that_solves_its_own_equation() -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    solved = 0
    for tasks in (2, 3, 5, 8):
        for seed in range(3):
            rows = torch.from_numpy(jacobian(seed, tasks, "general"))
            rows /= (rows @ rows.T).norm().sqrt()
            alpha = aggregation.NashMTL(n_tasks=tasks, max_norm=0.0).weighting(rows)
            if float((rows @ rows.T @ alpha * alpha - 1).norm()) > 1e-3:
                continue
            solved += 1
            ours = Balancer("nash-mtl:max_norm=0").weights(rows @ rows.T)
            torch.testing.assert_close(ours @ rows, alpha.double() @ rows, rtol=1e-4, atol=1e-6)
    assert solved >= 8


@pytest.mark.parametrize("name", ["GradVac", "PCD", "ExcessMTL"])
def test_every_kind_of_state_can_be_kept(name: str) -> None:
    first, second = Kept(getattr(aggregation, name)()), Kept(getattr(aggregation, name)())
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        first.module(rows)
    state = first.state_dict()
    pack(state, {})  # what a checkpoint can hold
    second.load_state_dict(state)
    torch.manual_seed(1)
    expected = first.module(rows + 1)
    torch.manual_seed(1)
    assert torch.equal(second.module(rows + 1), expected)


def test_what_is_not_installed_is_said_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r'pip install "reconmtl\[torchjd\]"'):
        Balancer("upgrad", TASKS)
    assert Balancer("cagrad").label == "CAGrad"  # ours needs nothing
