"""The known answer is right: computed with plain autograd, without anything of the library's own."""

import pytest
import torch
from torch import nn

from reconmtl.problems import planted

FIGHTING = ("blocks.1", "blocks.4")


def task_gradients(
    model: nn.Module, inputs: torch.Tensor, targets: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Task -> block -> gradient."""
    blocks = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.startswith("blocks.")}
    outputs = model(inputs)
    found = {}
    for task, target in targets.items():
        loss = ((outputs[task] - target) ** 2).sum(1).mean()
        grads = torch.autograd.grad(loss, list(blocks.values()), retain_graph=True)
        found[task] = dict(zip(blocks, grads, strict=True))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_layers_fight_at_every_step_and_the_others_never(seed: int) -> None:
    problem = planted.make()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.recipe.lr)
    order = torch.Generator().manual_seed(seed)
    for _ in range(4):
        for indices in torch.randperm(len(problem.train), generator=order).split(32):
            inputs, targets = problem.train.batch(indices)
            found = task_gradients(model, inputs, targets)
            for name in found["plus"]:
                cosine = nn.functional.cosine_similarity(found["plus"][name], found["minus"][name]).item()
                assert cosine < -0.5 if name in FIGHTING else cosine > 0.99, name
            optimizer.zero_grad()
            outputs = model(inputs)
            sum(((outputs[t] - y) ** 2).sum(1).mean() for t, y in targets.items()).backward()
            optimizer.step()
    # Joint training learns the friendly layers and cannot learn the others.
    errors = {t: (model(problem.train.inputs)[t] - y).square().mean(0) for t, y in problem.train.targets.items()}
    for error in errors.values():
        for i, value in enumerate(error.tolist()):
            assert value > 1 if f"blocks.{i}" in FIGHTING else value < 0.05


def test_the_data_are_the_same_every_time_and_training_and_test_differ() -> None:
    one, two = planted.make(), planted.make()
    for a, b in ((one.train, two.train), (one.test, two.test)):
        assert isinstance(a, planted.PlantedData) and isinstance(b, planted.PlantedData)
        assert torch.equal(a.inputs, b.inputs) and all(torch.equal(a.targets[t], b.targets[t]) for t in planted.TASKS)
    assert one.fingerprint() == two.fingerprint()
    assert not torch.equal(one.train[0][0], one.test[0][0])
    assert float(one.train[0][0].sum()) == pytest.approx(-7.6976037, abs=1e-5)


def test_a_batch_is_its_items_stacked() -> None:
    data = planted.PlantedData(5, seed=3)
    inputs, targets = data.batch(torch.tensor([4, 0]))
    for row, i in enumerate((4, 0)):
        x, y = data[i]
        assert torch.equal(inputs[row], x) and all(torch.equal(targets[t][row], y[t]) for t in planted.TASKS)


def test_the_metric_is_the_mean_squared_error_and_the_loss_its_sum_over_the_layers() -> None:
    output, target = torch.randn(7, planted.LAYERS), torch.randn(7, planted.LAYERS)
    per_sample = planted.squared_error(output, target)
    assert per_sample.shape == (7,)
    torch.testing.assert_close(per_sample.mean(), nn.functional.mse_loss(output, target))
    (metric,) = planted.make().tasks[0].metrics
    assert (metric.name, metric.fn) == ("mse", planted.squared_error)
    loss = planted.make().tasks[0].loss(output, target)
    torch.testing.assert_close(loss, ((output - target) ** 2).sum(1).mean())
