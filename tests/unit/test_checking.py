from typing import Any

import pytest
import torch
from torch import nn

import reconmtl as rm
from reconmtl.checking import covering, without_targets
from reconmtl.errors import ProbeError, ProblemError
from reconmtl.problems import planted


def test_layer_table_says_which_tasks_reach_a_layer() -> None:
    model = nn.ModuleDict(
        {"trunk": nn.Linear(2, 3), "a": nn.Linear(3, 1), "b": nn.Linear(3, 1), "unused": nn.Linear(1, 1)}
    )
    z = model["trunk"](torch.ones(4, 2))
    table = rm.layer_table(model, {"a": model["a"](z).sum(), "b": model["b"](z).sum(), "c": z.sum()})
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["layer", "type", "parameters", "reached by"]
    assert [[c[0], c[2], c[3]] for c in cells[2:]] == [
        ["trunk", "9", "all"],
        ["a", "4", "a"],
        ["b", "4", "b"],
        ["unused", "2", "none"],
    ]


def test_check_probe_passes_on_a_right_engine_and_touches_nothing() -> None:
    state = torch.get_rng_state()
    assert rm.check_probe(planted.make()) < 1e-5
    assert torch.equal(state, torch.get_rng_state())


def test_check_probe_fails_on_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconmtl.passes.torch.Tensor.addmm_", lambda g, a, b: g.add_((a + a.flip(0)) @ b))
    with pytest.raises(ProbeError, match=r"layer 'blocks\.\d'"):
        rm.check_probe(planted.make())


class ByTask:
    """Every sample has a target for one task only, and the tasks come one after the other."""

    def __init__(self, *tasks: str) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return 20 * len(self.tasks)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.randn(2), {self.tasks[i // 20]: torch.zeros(1)}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 2)
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.trunk(x)
        return {t: h(z) for t, h in self.heads.items()}


def _by_task(*tasks: str) -> rm.Problem:
    return rm.Problem(
        model=Pair,
        tasks=[rm.Task(t, loss=nn.functional.mse_loss) for t in ("a", "b")],
        train=ByTask(*tasks),
        test=ByTask("a", "b"),
        recipe=rm.Recipe(epochs=1, batch_size=4, lr=0.1),
    )


def test_a_data_set_sorted_by_task_is_looked_through_until_every_task_was_seen() -> None:
    problem = _by_task("a", "b")
    assert {i // 20 for i in covering(problem).tolist()} == {0, 1}
    assert rm.check_probe(problem) < 1e-5


def test_a_task_without_any_target_is_named() -> None:
    with pytest.raises(ProblemError, match=r"target for \['b'\]"):
        covering(_by_task("a"))


def _sparse(tasks: tuple[str, ...], judged: tuple[str, ...] = ("a", "b"), **changes: Any) -> rm.Problem:
    """Test samples have targets of these tasks; those that are judged have a metric."""
    metric = rm.Metric("mae", lambda o, y: (o - y).abs().squeeze(1), best="min")
    named = [rm.Task(t, loss=nn.functional.mse_loss, metrics=[metric] if t in judged else ()) for t in ("a", "b")]
    return _by_task("a", "b").replace(**{"tasks": named, "test": ByTask(*tasks)} | changes)


def test_a_task_with_metrics_needs_targets_in_every_set_that_judges_it() -> None:
    assert without_targets(_sparse(("b", "a"))) == []
    assert without_targets(_sparse(("a",), judged=("a",))) == []
    told = without_targets(_sparse(("a",), train=ByTask("b"), val=ByTask("b")))
    assert [line.split(":")[0] for line in told] == [
        "No sample of train has a target for ['a']",
        "No sample of test has a target for ['b']",
        "No sample of val has a target for ['a']",
    ]
    own = _sparse(("a", "b"), train={"a": ByTask("a"), "b": ByTask("b")}, test={"a": ByTask("a"), "b": ByTask("a")})
    assert [line.split(":")[0] for line in without_targets(own)] == ["No sample of test['b'] has a target for ['b']"]


def test_the_search_for_targets_ends_early() -> None:
    class Counted(ByTask):
        seen = 0

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            Counted.seen += 1
            return torch.randn(2), {"a": torch.zeros(1)}

    assert without_targets(_sparse(("a",), judged=("a",), test=Counted("a"))) == []
    assert Counted.seen == 1
    assert without_targets(_sparse(("a",), test=Counted("a"))) == []  # it may be rare: not known before the end
    assert 10_000 <= Counted.seen < 10_100
