"""The processes that train one model together, each on its part of the batch.

What they have to say to each other: whether all can go on, averages, their weights before the first step. Before a
measured step each tells the others in a few bytes what it is about to send; one that cannot go on says why instead of
leaving the others to wait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reconmtl.errors import ProbeError
from reconmtl.passes import Layout, as_real

BUCKET = 25 * 2**20
"""Bytes that travel at once, as in DistributedDataParallel; a copy of so much is held beside the gradients."""

REMEMBERED = 256
"""Descriptions of what other processes send that are remembered; all processes forget at the same time."""


class Replicas:
    """The processes that train one model together, each on its part of the batch.

    Every method is a collective: all processes of the group call it, in the same order.

    Args:
        group: The process group.
        wrapper: The DistributedDataParallel whose reducer averages the gradients of steps that are not measured; None
            if nobody does, so that this class has to.

    Attributes:
        size: Number of processes.
        rank: Position of this one.
    """

    def __init__(self, group: dist.ProcessGroup, wrapper: DistributedDataParallel | None = None) -> None:
        self.group, self.wrapper = group, wrapper
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._known: dict[int, Any] = {}
        self._compared = False

    @property
    def synchronises(self) -> bool:
        """Whether gradients of this step are averaged: not inside the wrapper's `no_sync()`."""
        w = self.wrapper
        return w is None or bool(w.require_backward_grad_sync or w.require_forward_param_sync)

    def agree(self, mine: Any, error: Exception | None = None) -> list[Any]:  # noqa: ANN401 plain JSON data
        """Exchange descriptions; 16 bytes per process while nobody says anything new.

        Args:
            mine: What this process describes, as plain JSON data.
            error: Why it cannot go on.

        Returns:
            Everyone's description, by rank.

        Raises:
            Exception: `error` itself; on the other processes a ProbeError that quotes it.
        """
        said = {"error": f"{type(error).__name__}: {error}"} if error is not None else {"ok": mine}
        text = json.dumps(said).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        device = self._talking()
        heads = [(int(d), int(n)) for d, n in self._gathered(torch.tensor([digest, len(text)], device=device)).tolist()]
        digests = [d for d, _ in heads]
        if set(digests) == {digest}:
            everyone = [said] * self.size
        else:
            if not self._known.keys() >= set(digests):
                longest = max(n for _, n in heads)
                padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=device)
                texts = self._gathered(padded).cpu()
                if len(self._known) > REMEMBERED:
                    self._known.clear()
                for (d, n), row in zip(heads, texts, strict=True):
                    self._known[d] = json.loads(bytes(row[:n].tolist()))
            everyone = [self._known[d] for d in digests]
        if error is not None:
            raise error
        failed = {r: s["error"] for r, s in enumerate(everyone) if "error" in s}
        if failed:
            what = "; ".join(f"process {r}: {e}" for r, e in failed.items())
            raise ProbeError(f"Another process of the group cannot go on, so this one stops too. {what}")
        return [s["ok"] for s in everyone]

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Average tensors over the processes.

        Args:
            tensors: The same number and shapes on every process; sparse ones come back dense.

        Returns:
            Their means, equal on all processes; the given ones are left alone.
        """
        out: dict[int, Tensor] = {}
        for indices in _buckets(tensors):
            dense = [tensors[i].to_dense() if tensors[i].is_sparse else tensors[i] for i in indices]
            flat = torch.cat([t.detach().flatten() for t in dense])
            self.mean_(flat)
            pieces = flat.split([t.numel() for t in dense])
            out |= {i: piece.view(t.shape) for i, piece, t in zip(indices, pieces, dense, strict=True)}
        return [out[i] for i in range(len(tensors))]

    def mean_(self, flat: Tensor) -> None:
        """Average a contiguous tensor over the processes, in place."""
        dist.all_reduce(flat.mul_(1 / self.size), group=self.group)

    def average_grads(self, parameters: Mapping[str, nn.Parameter], error: Exception | None = None) -> None:
        """Average `.grad` over the processes, as DistributedDataParallel does; for loops that do not use it.

        Args:
            parameters: Name -> parameter, the same on every process. A process that has no gradient for one counts as
                zero; what no process has a gradient for is left alone.
            error: Why this process cannot go on, see `agree`.
        """
        ignored = set() if self.wrapper is None else {id(p) for n, p in _ignored(self.wrapper)}
        mine = [n for n, p in parameters.items() if p.grad is not None and id(p) not in ignored]
        anyone = set().union(*self.agree(mine, error))
        chosen = [p for n, p in parameters.items() if n in anyone]
        found = self.means([torch.zeros_like(p) if p.grad is None else p.grad for p in chosen])
        for p, mean in zip(chosen, found, strict=True):
            if p.grad is None:
                p.grad = mean
            elif p.grad.is_sparse:
                p.grad = mean.to_sparse(p.grad.sparse_dim())
            else:
                p.grad.copy_(mean)

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers."""
        number = torch.tensor([value], device=self._talking())
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return int(number.item())

    def compare(self, model: nn.Module) -> None:
        """Refuse processes that do not hold the same weights; once, and not where the wrapper made them equal.

        Raises:
            ProbeError: On every process, with the name of the first parameter that differs.
        """
        if self._compared or self.wrapper is not None:
            return
        named = dict(model.named_parameters())
        shapes = self.agree([[n, list(p.shape)] for n, p in named.items()])
        for rank, other in enumerate(shapes):
            if other != shapes[0]:
                odd = next((a or b for a, b in _longest(shapes[0], other) if a != b), None)
                raise ProbeError(
                    f"Processes 0 and {rank} hold different models: see parameter {odd[0] if odd else '?'!r}."
                )
        with torch.no_grad():
            weights = [as_real(p).double() for p in named.values()]
            sums = [torch.stack([w.sum(), w.abs().sum()]).cpu() for w in weights]
        if sums:
            found = self._gathered(torch.stack(sums).to(self._talking()))
            apart = ((found[..., 0] - found[:1, :, 0]).abs() > 1e-6 * found[:1, :, 1]).any(0).tolist()
            odd_names = [n for n, differs in zip(named, apart, strict=True) if differs]
            if odd_names:
                raise ProbeError(
                    f"The processes hold different weights in {odd_names[0]!r} ({len(odd_names)} of {len(named)} "
                    "parameters): averaging their gradients would train none of them. Start all from one seed or "
                    "checkpoint, or wrap the model in DistributedDataParallel, which copies those of process 0."
                )
        self._compared = True

    def refuse(self, layout: Layout) -> None:
        """Raise a ProbeError if the wrapper does with gradients what a measured step could not follow."""
        w = self.wrapper
        if w is None:
            return
        start = "This DistributedDataParallel "
        if w._comm_hooks:
            raise ProbeError(
                f"{start}has a communication hook, which changes gradients on their way (compression, mixed precision, "
                "an optimizer inside the backward pass): measured steps would differ from the others. Probe without it."
            )
        if w._join_config.enable:
            raise ProbeError(
                f"{start}is used with `join()`: processes that have run out of data could not take part in measuring. "
                "Give every process the same number of batches, e.g. by DistributedSampler(drop_last=True)."
            )
        if w.static_graph and not w._static_graph_delay_allreduce_enqueued:
            raise ProbeError(
                f"{start}has static_graph=True and learns the graph from the first backward pass, which must be a "
                "plain one: pass `start=1` to the probe."
            )
        trained = {id(p) for _, p in layout.shared} | {id(p) for ps in layout.exclusive for p in ps}
        ignored = [n for n, p in _ignored(w) if id(p) in trained]
        if ignored:
            raise ProbeError(
                f"{start}is told to leave parameter {ignored[0]!r} out, so its gradient stays local to each process; "
                "freeze it while probing."
            )

    def reduced(self, shared: Tensor, packed: Tensor) -> None:
        """Sum [processes x n] over the processes into this one's share [n]."""
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(shared, packed, group=self.group)

    def gathered(self, share: Tensor) -> Tensor:
        """Put everyone's [n] together: [processes, n]."""
        return self._gathered(share)

    def _gathered(self, share: Tensor) -> Tensor:
        out = share.new_empty((self.size * share.shape[0], *share.shape[1:]))
        _collective("all_gather_single", "all_gather_into_tensor")(out, share, group=self.group)
        return out.view(self.size, *share.shape)

    def _talking(self) -> torch.device:
        """Where descriptions travel: on the CPU if the group can, since an accelerator would have to be waited for."""
        kinds = [d.type for d in self.group._device_types]  # the only way to ask; torch's object collectives do too
        if "cpu" in kinds:
            return torch.device("cpu")
        return torch.device(kinds[0], torch.accelerator.current_device_index())


def _collective(name: str, before: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, before)  # renamed in torch 2.13
    return found


def _longest(a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    for k in range(max(len(a), len(b))):
        yield (a[k] if k < len(a) else None), (b[k] if k < len(b) else None)


def _ignored(wrapper: DistributedDataParallel) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in wrapper.module.named_parameters() if n in wrapper.parameters_to_ignore]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of tensors that travel together: of one type on one device, up to BUCKET bytes."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, t in enumerate(tensors):
        by_kind.setdefault((t.dtype, t.device), []).append(i)
    for indices in by_kind.values():
        bucket: list[int] = []
        held = 0
        for i in indices:
            size = tensors[i].numel() * tensors[i].dtype.itemsize
            if bucket and held + size > BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(i)
            held += size
        yield bucket


def find_replicas(model: nn.Module, group: Any = None) -> tuple[nn.Module, Replicas | None]:  # noqa: ANN401 checked
    """Find the module whose layers are measured, and the processes that average its gradients.

    Args:
        model: The network, bare, in DistributedDataParallel or as Lightning Fabric set it up.
        group: A process group, or the DistributedDataParallel that contains `model`; None takes the wrapper found in
            `model`; False says that this process trains a model of its own.

    Returns:
        The bare module and the processes; None for one process.

    Raises:
        ProbeError: If its parameters are sharded, or a wrapper hides it.
    """
    bare, wrapper = _unwrapped(model)
    if isinstance(group, DistributedDataParallel):
        if not {id(p) for p in bare.parameters()} <= {id(p) for p in group.module.parameters()}:
            raise ProbeError("group: this DistributedDataParallel does not contain the probed model.")
        wrapper = group
    elif group is False and wrapper is not None:
        raise ProbeError("group=False: the model is wrapped in DistributedDataParallel, so its gradients are averaged.")
    elif group not in (None, False) and not isinstance(group, dist.ProcessGroup):
        raise ProbeError(
            f"group = {group!r:.80}: expected a process group, e.g. `torch.distributed.group.WORLD`, "
            "a DistributedDataParallel, False for a model that only this process trains, or None."
        )
    for name, p in bare.named_parameters():
        if any(c.__name__ == "DTensor" for c in type(p).__mro__):
            raise ProbeError(
                f"Parameter {name!r} is a DTensor, sharded over processes (FSDP2's fully_shard, tensor parallelism): "
                "per-task gradients of sharded parameters are not measured. Probe a replica under "
                "DistributedDataParallel; docs/distributed.md plans the sharded case."
            )
    if wrapper is not None:
        return bare, _several(wrapper.process_group, wrapper)
    if group in (None, False):
        return bare, None
    return bare, _several(group, None)


def _several(group: dist.ProcessGroup, wrapper: DistributedDataParallel | None) -> Replicas | None:
    return Replicas(group, wrapper) if dist.get_world_size(group) > 1 else None


def _unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Look through Fabric's module and torch.compile's for a DistributedDataParallel."""
    inner: Any = model
    wrapper = None
    while True:
        if isinstance(inner, DistributedDataParallel):
            wrapper = inner
            inner = inner.module
        elif type(inner).__name__ == "_FabricModule":
            if _unwrapped(inner._forward_module)[1] is None:
                return inner.module, wrapper
            inner = inner._forward_module
        elif type(inner).__name__ == "OptimizedModule" and _unwrapped(inner._orig_mod)[1] is not None:
            inner = inner._orig_mod
        else:
            break
    for name, module in inner.named_modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine") or isinstance(module, DistributedDataParallel):
            where = "The model" if not name else f"Module {name!r} inside the model"
            raise ProbeError(
                f"{where} is wrapped in {kind}, under which per-task gradients would silently stay local to each "
                "process. Wrap the whole model in DistributedDataParallel and probe that."
            )
    return inner, wrapper


def refuse_alone() -> None:
    """Raise a ProbeError if torch.distributed runs several processes, and nobody said what they have to do with it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ProbeError(
            f"torch.distributed runs {dist.get_world_size()} processes, but the probe was given a bare model: its "
            "gradients would silently stay local to each. Pass the DistributedDataParallel itself; or "
            "`group=torch.distributed.group.WORLD` and the probe averages gradients over the processes; or "
            "`group=False` if each process trains a model of its own."
        )
