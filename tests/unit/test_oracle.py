import torch
from torch import nn

import oracles
from reconmtl.oracle import reference_grams


def test_reference_grams_agree_with_one_multiplication_per_element() -> None:
    torch.manual_seed(0)
    embed, recur = nn.Embedding(11, 8, sparse=True), nn.LSTM(8, 8, batch_first=True)
    z = recur(embed(torch.randint(0, 11, (4, 6))))[0]
    losses = {"a": z.pow(2).mean(), "b": z[:, -1].sum(), "c": z[0].sin().sum()}
    layers = {"embed": list(embed.parameters()), "recur": list(recur.parameters())}
    torch.testing.assert_close(
        reference_grams(losses, layers), oracles.gram(losses, list(layers.values())), rtol=1e-5, atol=0
    )


def test_a_layer_that_a_task_does_not_reach_counts_as_zero() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(3, 2)
    found = reference_grams({"a": layer(x).sum(), "b": other(x).sum()}, {"layer": list(layer.parameters())})
    assert found[0, 0, 0] > 0
    assert found[0, 0, 1] == found[0, 1, 1] == 0
