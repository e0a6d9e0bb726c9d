"""The network for molecules against PyTorch Geometric's layers, which the field's benchmark uses."""

import pytest
import torch

from reconmtl.errors import ProblemError
from reconmtl.layers import find_layers
from reconmtl.networks import nnconv


def graphs() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    molecule = torch.tensor([0, 0, 0, 1, 2, 2])  # the second has one atom, so no pair
    pairs = torch.tensor([[0, 1, 1, 2, 4, 5, 0], [1, 0, 2, 1, 5, 4, 2]])
    atoms, known = torch.randn(6, 8, generator=draw), torch.randn(7, 2, generator=draw)
    return atoms, pairs, known, molecule


def test_its_layers_equal_those_of_pytorch_geometric() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    _, pairs, known, molecule = graphs()
    x = torch.randn(6, 5)
    mine = nnconv.NNConv(5, 2)
    other = geometric.NNConv(5, 5, mine.nn, aggr="mean")
    with torch.no_grad():
        other.lin.weight.copy_(mine.root.weight)
        other.bias.copy_(mine.root.bias)
    assert torch.allclose(mine(x, pairs, mine.weights(known)), other(x, pairs, known), atol=1e-6)
    reader = nnconv.Set2Set(5)
    theirs = geometric.Set2Set(5, processing_steps=3)
    theirs.lstm.load_state_dict({f"{n}_l0": p for n, p in reader.lstm.state_dict().items()})
    assert torch.allclose(reader(x, molecule, 3), theirs(x, molecule), atol=1e-6)


def test_a_molecule_is_judged_alone() -> None:
    torch.manual_seed(0)
    model = nnconv.qm9(4, tasks=["a", "b"]).eval()
    atoms, pairs, known, molecule = graphs()
    together = model(atoms, pairs, known, molecule)
    assert together["a"].shape == (3,)
    alone = model(atoms[4:], pairs[:, 4:6] - 4, known[4:6], molecule[4:] - 2)
    assert torch.allclose(alone["b"], together["b"][2:], atol=1e-6)
    names = ["lin0", "conv.nn.0", "conv.nn.2", "conv.root", "gru", "set2set.lstm", "lin1", "heads.a", "heads.b"]
    assert [layer.name for layer in find_layers(model)] == names
    with pytest.raises(ProblemError, match="at least 1"):
        nnconv.qm9(0, tasks=["a"])
