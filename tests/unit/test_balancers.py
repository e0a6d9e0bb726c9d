import pytest

from reconmtl.balancers import BALANCERS, check_balancer, label_of, make_rule
from reconmtl.errors import ProblemError
from reconmtl.rules import joint

pytest.importorskip("torchjd")


@pytest.mark.parametrize("name", sorted(BALANCERS))
def test_every_name_makes_a_rule_and_its_label_says_its_parameters(name: str) -> None:
    assert check_balancer(name) == []
    rule, at = make_rule(name, 3)
    assert (rule.takes in ("gram", "rows", "losses"), at) == (True, "weights")
    label = label_of(name)
    assert label == BALANCERS[name].label
    assert label_of(f"{name}:x=1,y=2") == f"{label} (x=1, y=2)"
    alone = rule.takes == "gram" and not rule.weighs_losses
    assert (check_balancer(f"{name}:at=features") == []) == alone
    if alone:
        assert make_rule(f"{name}:at=features", 3)[1] == "features"


def test_every_fault_of_a_name_and_its_parameters_is_said_at_once() -> None:
    assert check_balancer("cagrad:c=0.4,rescale=false") == []
    faults = check_balancer("cagrad:a=0.4,rescale=2,c=-1")
    assert len(faults) == 2
    assert "'c'" in faults[0]
    assert "true or false" in faults[1]
    assert "'cagrad'" in check_balancer("cagra")[0]
    assert "not negative" in check_balancer("cagrad:c=-1")[0]
    assert "a number" in check_balancer("cagrad:c=x")[0]
    assert "expected weights or features" in check_balancer("mgda:at=heads")[0]
    assert check_balancer(joint()) == []
    with pytest.raises(ProblemError, match=r"(?s)no parameter 'a'.*true or false"):
        make_rule("cagrad:a=0.4,rescale=2", 2)
    with pytest.raises(ProblemError, match="number per task"):
        make_rule("uw", 0)


def test_objects_are_called_by_their_class_or_function() -> None:
    def cautious(gram: object) -> object:
        return gram

    assert label_of(cautious) == "cautious"
    assert label_of(joint()) == "FromGram"
    assert label_of("unknown:c=1") == "unknown (c=1)"
