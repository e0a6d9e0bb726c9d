"""Printed model sizes against networks that are built."""

import pytest

from reconmtl.paper import sizes
from reconmtl.paper.published import SINGLE
from reconmtl.plan import Plan
from reconmtl.splitting import cost


def test_every_printed_size_is_that_of_our_network_but_for_two_other_networks_and_rotations_left_out() -> None:
    printed = sizes.printed_sizes()
    assert len(printed) == 30
    odd = {(p.table, p.method) for p in printed if not p.agrees}
    assert odd == {("t5", SINGLE), ("t16", SINGLE), ("t1", "RotoGrad")}
    exact = [p for p in printed if p.agrees and abs(sizes.megabytes(p.counted) - p.printed) <= 0.00501]
    assert len(exact) == 27  # all of those that agree do so by rounding


@pytest.mark.parametrize(
    ("name", "shared", "layers"),
    [("multifashion", 11_221_540, 41), ("celeba", 11_176_512, 40), ("segnet cityscapes", 24_943_296, 52)],
)
def test_what_is_shared_is_the_sum_of_the_shared_layers(name: str, shared: int, layers: int) -> None:
    found = sizes.shared_layers(name)
    assert sizes.size(name).shared == shared == sum(layer.numel for layer in found)
    assert len(found) == layers


def test_random_controls_are_those_of_plan() -> None:
    """The same permutations as `Plan`'s controls, and the same size as the split network's price."""
    import torch

    network = sizes.NETWORKS["multifashion"]
    layers = sizes.shared_layers("multifashion")

    class Of:
        tasks = network.tasks
        network_layers = tuple(layer.name for layer in layers)
        sizes = {layer.name: layer.numel for layer in layers}  # noqa: RUF012 read only
        types = {layer.name: layer.type for layer in layers}  # noqa: RUF012 read only

    budget = sum(layer.numel for layer in sizes.found_by_recon("multifashion"))
    assert budget == 160_192
    with torch.device("meta"):
        model = network.make(tasks=list(network.tasks))
    for seed in range(3):
        for plan, chosen in (
            (Plan.random_layers(Of(), 25, seed=seed), sizes.random_layers(seed)),
            (Plan.random_parameters(Of(), budget, seed=seed, exceed=True), sizes.random_parameters(seed)),
        ):
            assert set(plan.layers) == {layer.name for layer in chosen}
            assert cost(model, plan).parameters == sizes.split_size("multifashion", chosen)
