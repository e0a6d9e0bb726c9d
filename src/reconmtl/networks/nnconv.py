"""Messages between atoms, then a summary of the set: the network of the field's multi-task benchmark on QM9.

Three rounds of messages whose weights follow from what is known of a pair of atoms (NNConv), each followed by a GRU;
Set2Set summarises a molecule's atoms; a linear head per task.

Reference: Gilmer et al., Neural Message Passing for Quantum Chemistry, ICML 2017; in multi-task form Navon et al.,
Multi-Task Learning as a Bargaining Game, ICML 2022, section 6.2.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reconmtl.errors import ProblemError
from reconmtl.plan import check_tasks

ROUNDS = 3
HIDDEN = 128
"""Units between a pair's features and its weights."""


class NNConv(nn.Module):
    """Messages whose weights follow from what is known of a pair: x_i' = x_i R + b + mean_j x_j W(pair ij).

    Args:
        width: Channels of an atom.
        pair: Features of a pair.

    Reference: Gilmer et al., ICML 2017, section 5.2 ("edge network").
    """

    def __init__(self, width: int, pair: int) -> None:
        super().__init__()
        self.width = width
        self.nn = nn.Sequential(nn.Linear(pair, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width * width))
        self.root = nn.Linear(width, width)

    def weights(self, known: Tensor) -> Tensor:
        """What is known of pairs [P, pair] -> their weights [P, width, width], the same in every round."""
        weights: Tensor = self.nn(known)
        return weights.view(-1, self.width, self.width)

    def forward(self, x: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
        """Atoms [A, width], pairs (from, to) [2, P], weights [P, width, width] -> [A, width]."""
        messages = torch.einsum("pi,pij->pj", x.index_select(0, pairs[0]), weights)
        received = torch.ones_like(pairs[1], dtype=x.dtype)
        count = x.new_zeros(x.shape[0]).index_add(0, pairs[1], received).clamp(min=1)
        total = torch.zeros_like(x).index_add(0, pairs[1], messages)
        out: Tensor = self.root(x) + total / count[:, None]
        return out


class Set2Set(nn.Module):
    """A summary of each molecule's atoms: an LSTM asks for them a few times; [A, width] -> [molecules, 2 width].

    Args:
        width: Channels of an atom.
        steps: How many times.

    Reference: Vinyals et al., Order Matters: Sequence to sequence for sets, ICLR 2016.
    """

    def __init__(self, width: int, steps: int = 3) -> None:
        super().__init__()
        self.lstm, self.steps = nn.LSTMCell(2 * width, width), steps

    def forward(self, x: Tensor, molecule: Tensor, molecules: int) -> Tensor:
        """Atoms [A, width] and the molecule of each [A]."""
        hidden = cell = x.new_zeros(molecules, x.shape[1])
        asked = x.new_zeros(molecules, 2 * x.shape[1])
        for _ in range(self.steps):
            hidden, cell = self.lstm(asked, (hidden, cell))
            score = (x * hidden.index_select(0, molecule)).sum(1)
            highest = score.new_full((molecules,), -torch.inf).scatter_reduce(0, molecule, score.detach(), "amax")
            weight = (score - highest.index_select(0, molecule)).exp()
            total = weight.new_zeros(molecules).index_add(0, molecule, weight)
            read = torch.zeros_like(hidden).index_add(0, molecule, x * weight[:, None]) / total[:, None]
            asked = torch.cat([hidden, read], 1)
        return asked


class MessagePassing(nn.Module):
    """See `qm9`."""

    def __init__(self, tasks: Iterable[str], *, width: int, atom: int, pair: int) -> None:
        super().__init__()
        names = check_tasks(tasks)
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ProblemError(f"width = {width!r}: expected a number of channels, at least 1.")
        self.lin0 = nn.Linear(atom, width)
        self.conv = NNConv(width, pair)
        self.gru = nn.GRUCell(width, width)
        self.set2set = Set2Set(width)
        self.lin1 = nn.Linear(2 * width, width)
        self.heads = nn.ModuleDict({t: nn.Linear(width, 1) for t in names})

    def forward(self, atoms: Tensor, pairs: Tensor, known: Tensor, molecule: Tensor) -> dict[str, Tensor]:
        """Atoms [A, atom], pairs [2, P], known [P, pair], molecule of each atom [A] -> {task: [molecules]}.

        Molecules are numbered from 0 without gaps; each has at least one atom.
        """
        x = self.lin0(atoms).relu()
        weights = self.conv.weights(known)
        for _ in range(ROUNDS):
            x = self.gru(self.conv(x, pairs, weights).relu(), x)
        features = self.lin1(self.set2set(x, molecule, int(molecule[-1]) + 1)).relu()
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


def qm9(width: int = 64, *, tasks: Iterable[str], atom: int = 8, pair: int = 2) -> nn.Module:
    """The network for QM9's targets.

    Args:
        width: Channels of an atom; 64 is the field's.
        tasks: Names of the targets.
        atom: Features of an atom.
        pair: Features of a pair of atoms.

    Returns:
        A module: what `reconmtl.problems.qm9_data.QM9` hands out -> {task: [molecules]}.

    Raises:
        ProblemError: If the width is not a positive whole number.
    """
    return MessagePassing(tasks, width=width, atom=atom, pair=pair)
