"""A network taken apart: stages that follow one another, and a head per task. Other architectures are built from these.

A stage maps a state to a state. A state is a tensor, or a tuple whose first item is the features and whose other items
only later stages of the same network read (the positions of pooled maxima, say).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from reconmtl.errors import ProblemError


@dataclass(frozen=True)
class Pieces:
    """What a joint network is made of.

    Attributes:
        stages: The shared part, in order.
        heads: {task: module from the last state's features to the task's output}.
        exchange: Positions of the stages after which networks side by side may exchange features; None: all but the
            last.
    """

    stages: list[nn.Module]
    heads: Mapping[str, nn.Module]
    exchange: tuple[int, ...] | None = None


@runtime_checkable
class TakenApart(Protocol):
    """A network that says what it is made of; the networks of the paper do, and yours may."""

    def pieces(self) -> Pieces:
        """Its own modules: calling the stages one after another and then a head is calling the network."""


class Stages(nn.Sequential):
    """Stages one after another: an image to features."""

    def forward(self, x: Tensor) -> Tensor:
        """The features of the last stage."""
        return features(cast(Any, super()).forward(x))


def take_apart(model: nn.Module) -> Pieces:
    """The pieces of a network.

    Raises:
        ProblemError: If the network does not say what it is made of.
    """
    if not isinstance(model, TakenApart):
        raise ProblemError(
            f"{type(model).__name__} does not say what it is made of: give it a method `pieces(self)` that returns "
            "reconmtl.networks.pieces.Pieces(stages=[...], heads={task: ...}) of its own modules."
        )
    return model.pieces()


def features(state: Any) -> Tensor:  # noqa: ANN401 a tensor, or a tuple of it and more
    """The features of a state."""
    found: Tensor = state[0] if isinstance(state, tuple) else state
    return found


def with_features(state: Any, new: Tensor) -> Any:  # noqa: ANN401
    """The state with other features."""
    return (new, *state[1:]) if isinstance(state, tuple) else new
