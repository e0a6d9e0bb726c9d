import pytest
import torch
from torch import nn

import reconmtl as rm
from reconmtl.errors import ProbeError
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
