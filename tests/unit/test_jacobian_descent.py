import pytest
import torch

from reconmtl.balance import Balancer
from reconmtl.checkpoints import pack
from reconmtl.errors import MissingExtraError
from reconmtl.jacobian_descent import Kept

aggregation = pytest.importorskip("torchjd.aggregation")
TASKS = ("a", "b", "c")

RELATIONS = [
    ("pcgrad", aggregation.PCGrad, 1.0),
    ("imtl-g", aggregation.IMTLG, 3.0),
    ("aligned-mtl", aggregation.AlignedMTL, 3.0),
    ("aligned-mtl:scale_mode=rmse", lambda: aggregation.AlignedMTL(scale_mode="rmse"), 3.0),
    ("upgrad", aggregation.UPGrad, 3.0),
    ("dualproj", aggregation.DualProj, 3.0),
    ("mgda", lambda: aggregation.MGDA(epsilon=1e-9, max_iters=100000), 3.0),
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
