"""The part of the page about chance: what it says follows from the nulls, and it is silent without Gram matrices."""

import torch

from logs import make_log, two_task_grams
from reconmtl.conflicts import ConflictLog
from reconmtl.nulls import excess
from reconmtl.plan import Plan
from reconmtl.reporting.chance import Chance, section
from studies import gappy, material


def noisy_and_fighting(steps: int = 200) -> ConflictLog:
    torch.manual_seed(0)
    small, fighting = torch.randn(steps, 1) * 0.45, torch.full((steps, 1), -0.3) + 0.02 * torch.randn(steps, 1)
    calm = 0.02 * torch.randn(steps, 1)
    return make_log(two_task_grams(torch.cat([small.clamp(-1, 1), fighting, calm], 1).tolist()))


def test_layers_that_fight_are_told_from_layers_that_scatter() -> None:
    log = noisy_and_fighting()
    found = Chance.of(material(log))
    assert found is not None and found.sure() == ["l1"]
    expected = excess(log, severity=-0.1)
    assert (found.found.chance == expected.chance).all() and found.order == (1, 0, 2)
    text = found.conclusion()
    assert text.startswith("1 of 3 layers (l1) conflicts more often than chance (p < 0.05 / 3)")
    assert "no other layer would be among the first 1" in text
    page = section(material(log, plan=Plan(tasks=log.tasks, layers=["l1"]))).body
    assert page is not None and page.text.count("data-tip") == 3 and page.text.count('class="rank inside"') == 1


def test_without_gram_matrices_of_some_steps_it_is_said() -> None:
    log = gappy(64)
    for nothing in (None, log.counted(), log.window(0, 4)):
        assert Chance.of(material(nothing)) is None
        assert section(material(nothing)).body is None and "no Gram" in section(material(nothing)).conclusion
    whole = section(material(log)).body
    assert whole is not None and whole.text.count("rank") >= len(log.layers)
