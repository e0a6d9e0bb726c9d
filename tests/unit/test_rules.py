import pytest
import torch

from reconmtl.balance import Balancer
from reconmtl.errors import RunError
from reconmtl.rules import DualBalancing, GradNorm, joint

TASKS = ("a", "b", "c", "d")


def test_no_conflict_no_surgery() -> None:
    rows = torch.rand(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert Balancer("pcgrad", TASKS).weights(rows @ rows.T).tolist() == [1.0] * 4
    torch.testing.assert_close(Balancer("graddrop", TASKS).rule.update(rows.clone(), rows[:, 0]), rows.sum(0))


def test_graddrop_leaves_the_sum_on_average() -> None:
    rows = torch.tensor([[1.0, 2.0, -1.0], [-0.5, 1.0, -2.0]], dtype=torch.float64)
    rule = Balancer("graddrop").rule
    torch.manual_seed(0)
    many = torch.stack([rule.update(rows.clone(), rows[:, 0]) for _ in range(4000)]).mean(0)
    expected = [1.0 * 1 / 1.5 - 0.5 * 0.5 / 1.5, 3.0, -3.0]
    torch.testing.assert_close(many, torch.tensor(expected, dtype=torch.float64), rtol=0.06, atol=0.0)


def test_gradnorm_moves_weights_as_written_in_the_paper() -> None:
    rule = GradNorm(alpha=1.5, lr=0.1)
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    losses = torch.tensor([2.0, 4.0], dtype=torch.float64)
    assert rule.weights(rows @ rows.T, losses).tolist() == [1.0, 1.0]
    # lengths 3 and 1, both to be their mean 2: the first weight falls by 0.1 x 3, the second rises by 0.1 x 1
    expected = torch.tensor([0.7, 1.1], dtype=torch.float64) * 2 / 1.8
    torch.testing.assert_close(rule.weights(rows @ rows.T, losses / 2), expected)


def test_db_mtl_brings_gradients_of_logarithms_to_the_longest() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    losses = torch.tensor([1.0, 0.1], dtype=torch.float64)
    update = DualBalancing(beta=0).update(rows.clone(), losses)
    torch.testing.assert_close(update, torch.tensor([10.0, 10.0], dtype=torch.float64), rtol=1e-6, atol=0.0)
    averaged = DualBalancing(beta=0.5, sigma=0)
    averaged.update(rows.clone(), losses)
    state = averaged.state_dict()["average"]
    torch.testing.assert_close(state, torch.tensor([[1.5, 0.0], [0.0, 5.0]], dtype=torch.float64), rtol=1e-6, atol=0.0)


def test_a_rule_without_a_state_takes_none() -> None:
    joint().load_state_dict(joint().state_dict())
    with pytest.raises(RunError, match="has no state"):
        joint().load_state_dict({"step": 1})
