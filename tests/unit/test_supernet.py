import itertools

import pytest
import torch

from blocks import TASKS, Chain
from reconmtl.errors import LayerMatchError, ProblemError
from reconmtl.networks.supernet import Supernet


def test_candidates_are_mixed_by_their_weights() -> None:
    torch.manual_seed(0)
    model = Chain()
    net = Supernet(model, model.blocks, TASKS)
    with torch.no_grad():
        for p in net.weights_of_network():
            p.normal_()
    x = torch.randn(5, 4)
    weights = torch.rand(3, 2)
    y = x
    for block, row in zip(model.blocks, weights, strict=True):
        options = net.model.get_submodule(block).options
        y = sum(w * option(y) for w, option in zip(row, options, strict=True))  # type: ignore[assignment,arg-type]
    for task in TASKS:
        torch.testing.assert_close(net(x, task, weights), net.model.heads[task](y))  # type: ignore[index,operator]
    assert next(model.parameters()).grad is None and not any(isinstance(m, Supernet) for m in model.modules())


def test_in_the_warm_up_each_task_has_a_network_of_its_own_and_draws_get_harder() -> None:
    torch.manual_seed(0)
    net, x = Supernet(Chain(), Chain.blocks, TASKS), torch.randn(5, 4)
    for t, task in enumerate(TASKS):
        net.zero_grad()
        net(x, task, net.own(t)).sum().backward()
        reached = {n for n, p in net.named_parameters() if p.grad is not None}
        assert {n.split(".")[3] for n in reached if "options" in n} == {str(t)}
    with torch.no_grad():
        net.alphas[:, 0, 1] = 2.0
    soft, hard = (torch.stack([net.draw(0, tau) for _ in range(400)]).detach() for tau in (5.0, 0.1))
    torch.testing.assert_close(soft.sum(2), torch.ones(400, 3))
    assert soft.amax(2).mean() < 0.75
    assert hard.amax(2).mean() > 0.95
    likely = float(torch.tensor([0.0, 2.0]).softmax(0)[1])  # the Gumbel trick draws by the softmax
    assert abs(float((hard.argmax(2) == 1).float().mean()) - likely) < 0.05


def test_blocks_that_cannot_be_searched_are_refused() -> None:
    model = Chain()
    with pytest.raises(LayerMatchError, match="Nearest: 'second'"):
        Supernet(model, ["secnd"], TASKS)
    for blocks, tasks in itertools.product((["second", "second.1"], [], ["first", "first"]), (TASKS,)):
        with pytest.raises(ProblemError, match="none inside another"):
            Supernet(model, blocks, tasks)
    with pytest.raises(ProblemError, match="at least two tasks"):
        Supernet(model, ["first"], ["a"])
