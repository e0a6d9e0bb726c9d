"""RotoGrad: each task sees the shared features through a rotation of its own, which is trained to align gradients.

Rotations stand between trunk and heads. The trunk gets the tasks' gradients at the features, brought to a common
length; each rotation follows a direction loss instead of its task's. In a split network task k has features z_k of its
own: the direction is the mean of the rescaled dL_k/dz_k, and each is scaled before it enters its branch. Without a
plan all z_k are one, and this is the published method.

Reference: Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning, ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from reconmtl.balance import Balancer, Source
from reconmtl.errors import ProbeError, ProblemError, RunError
from reconmtl.gram import Gradients, Measured, check_losses
from reconmtl.networks.pieces import take_apart
from reconmtl.splitting.branched import Branched

BURN_IN = 20
"""Step after which the gradients' first lengths are taken anew."""


class Rotated(nn.Module):
    """A head behind a rotation of the first features.

    Args:
        head: The task's.
        size: How many features are rotated, the first of the flattened ones.
    """

    def __init__(self, head: nn.Module, size: int) -> None:
        super().__init__()
        self.head, self.size = head, size
        rotation = nn.Linear(size, size, bias=False)
        with torch.no_grad():
            nn.init.orthogonal_(rotation.weight)  # uniform over all orthogonal matrices
            if torch.linalg.det(rotation.weight.double()) < 0:
                rotation.weight[0].neg_()  # a rotation, not a reflection
        self.rotation = parametrizations.orthogonal(rotation, orthogonal_map="matrix_exp", use_trivialization=True)
        self.seen: tuple[Tensor, Tensor] | None = None

    def turn(self) -> Tensor:
        """The rotation, [m, m]."""
        weight: Any = self.rotation.weight  # a property that the parametrisation has put there
        return cast(Tensor, weight)

    def forward(self, z: Tensor) -> Any:  # noqa: ANN401 the head's
        """Features [B, ...] -> the head's output for the rotated ones."""
        if self.size > z[0].numel():
            raise ProblemError(f"RotoGrad: m = {self.size}, but there are {z[0].numel()} features.")
        z = z.view_as(z)  # a node of this task's own in the graph
        flat = z.flatten(1)
        turned = flat[:, : self.size] @ self.turn().detach().T
        self.seen = (z, turned) if torch.is_grad_enabled() else None
        rest = flat[:, self.size :]
        return self.head((torch.cat([turned, rest], 1) if rest.shape[1] else turned).view(z.shape))


def rotated(model: nn.Module, size: int) -> nn.Module:
    """Put rotations before the heads of a network; it is changed and returned.

    Args:
        model: A network that can be taken apart, see `reconmtl.networks.pieces`.
        size: m: 100 for the paper's ResNet18, all of its features; 1024 for its SegNet, the first of the flattened map.

    Raises:
        ProblemError: If it cannot be taken apart, or a head is not a module of it.
    """
    heads = take_apart(model).heads
    for task, head in heads.items():
        places = [(parent, key) for parent in model.modules() for key, m in parent.named_children() if m is head]
        if len(places) != 1:
            raise ProblemError(f"RotoGrad: the head of {task!r} should be one module of the network.")
        parent, key = places[0]
        wrapped = Rotated(head, size)
        if isinstance(parent, nn.ModuleDict):
            parent[key] = wrapped
        else:
            setattr(parent, key, wrapped)
    return model


def rotations_slower(model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
    """Parameter groups in which the rotations have a learning rate of their own; for `Recipe(param_groups=...)`."""
    turning = {id(p) for m in model.modules() if isinstance(m, Rotated) for p in m.rotation.parameters()}
    rest = [p for p in model.parameters() if id(p) not in turning]
    return [{"params": rest}, {"params": [p for p in model.parameters() if id(p) in turning], "lr": lr}]


def _of_one_task(value: Tensor) -> Tensor:
    """The tensor of a value in a split network, which a head sees of its own task only."""
    if not isinstance(value, Branched):
        return value
    if len(value.vals) != 1:
        raise ProbeError("RotoGrad: split the network with sample=, so that it is known whose head is whose.")
    return value.vals[0]


@dataclass
class _Seen:
    """One task's gradients at its features."""

    head: Rotated
    z: Tensor
    grad: Tensor
    turned: Tensor


class RotoGrad(Balancer):
    """The steps of RotoGrad, for a network whose heads are `Rotated`.

    Args:
        model: The network, split or not.
        tasks: Names of the tasks.
        scale: Bring gradients to a common length; False only rotates.
    """

    def __init__(self, model: nn.Module, tasks: tuple[str, ...], *, scale: bool = True) -> None:
        super().__init__("joint", tasks)
        self.label = "RotoGrad" if scale else "Rotate only"
        self.scale, self.step = scale, 0
        self.first: Tensor | None = None
        found = [m for m in model.modules() if isinstance(m, Rotated)]
        if len(found) != len(tasks):
            raise ProblemError(f"RotoGrad: expected {len(tasks)} heads behind rotations, found {len(found)}.")
        self.heads = found

    @property
    def needs_graph(self) -> bool:
        """See `Balancer`: gradients are taken, and scaled, at the features."""
        return True

    def backward(
        self, gradients: Source, losses: Mapping[str, Tensor], *, scale: Tensor | float = 1.0, measure: bool = True
    ) -> Measured | None:
        """Add a step's gradients to `.grad`: of the trunk, the heads and the rotations."""
        check_losses(losses)
        if type(gradients) is not Gradients or isinstance(scale, Tensor):
            raise ProbeError("RotoGrad works in one process, and without a gradient scaler.")
        self._check(losses)
        measured = gradients.sweep(losses, retain_graph=True) if measure else None
        seen = [self._to_features(loss) for loss in losses.values()]
        shape = (len(seen), -1, *seen[0].z.shape[1:])
        exact = seen[0].head.turn().dtype  # under autocast features have a shorter one
        grads = torch.stack([s.grad.to(exact) for s in seen]).view(shape)
        norms = grads.flatten(1).norm(dim=1).clamp(min=1e-15)
        mean = grads.mean(0)
        common = (grads * (mean.norm() / norms).view(-1, *(1,) * mean.ndim)).mean(0).flatten(1)
        for s in seen:
            target = common[:, : s.head.size] @ s.head.turn().T
            direction = (target - s.turned.to(exact)).pow(2).sum(1).mean()
            parameters = list(s.head.rotation.parameters())
            for p, g in zip(parameters, torch.autograd.grad(direction, parameters), strict=True):
                p.grad = g if p.grad is None else p.grad + g
        factors = self._factors(norms) if self.scale else torch.ones_like(norms)
        scaled = [(g.view_as(s.z) * f).to(s.z) for s, g, f in zip(seen, grads, factors, strict=True)]
        torch.autograd.backward([s.z for s in seen], scaled)
        for head in self.heads:
            head.seen = None
        return measured

    def _check(self, losses: Mapping[str, Tensor]) -> None:
        if set(losses) != set(self.tasks):
            raise ProbeError(f"RotoGrad needs all tasks in every step, this one has {list(losses)}.")

    def _to_features(self, loss: Tensor) -> _Seen:
        """Backpropagate one loss to its features; its head's gradients are added to `.grad`."""
        heads = [h for h in self.heads if h.seen is not None]
        ends = [_of_one_task(t) for h in heads for t in h.seen or ()]
        own = [[p for p in h.head.parameters() if p.requires_grad] for h in heads]
        found = list(
            torch.autograd.grad(loss, [*ends, *(p for ps in own for p in ps)], retain_graph=True, allow_unused=True)
        )
        at = [k for k in range(len(heads)) if found[2 * k] is not None]
        if len(at) != 1:
            raise ProbeError(f"RotoGrad: a loss should reach one head behind a rotation, one reaches {len(at)}.")
        for p, g in zip([p for ps in own for p in ps], found[len(ends) :], strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g
        k = 2 * at[0]
        return _Seen(heads[at[0]], ends[k], found[k], found[k + 1])

    def _factors(self, norms: Tensor) -> Tensor:
        """What each task's gradient at the features is multiplied by."""
        if self.first is None or self.step == BURN_IN:
            self.first = norms.clone()
        self.step += 1
        progress = norms / self.first.to(norms)
        return (progress / progress.sum() * norms).sum() / norms

    def state_dict(self) -> dict[str, Any]:
        """See `Balancer`; the rotations themselves are parameters and buffers of the network."""
        return {"label": self.label, "step": self.step, "first": self.first}

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401 from a file
        """See `Balancer`."""
        if not isinstance(state, dict) or state.get("label") != self.label:
            raise RunError(f"it was made with another balancer than {self.label}.")
        self.step, self.first = int(state["step"]), state["first"]
