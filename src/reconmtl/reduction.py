"""Averaging task gradients over processes, a bucket of columns at a time; each process reduces a share of them.

Of a bucket [tasks, columns], every process gets the averages of its share of the columns. It adds that share's part of
each layer's Gram matrix, and sums it over the tasks: the share of the update that all gather.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from reconmtl.engines import full_precision
from reconmtl.errors import ProbeError
from reconmtl.passes import Layout, mark_absent, real_numel
from reconmtl.replicas import BUCKET, Replicas


@dataclass(frozen=True)
class _Piece:
    """Neighbouring columns that the same tasks reach."""

    column: int  # first one in the rows at hand
    start: int  # first one among all shared parameters
    width: int
    tasks: tuple[int, ...]

    def share(self, size: int) -> int:
        """Columns per process; the last ones may be padding."""
        return -(-self.width // size)


class Reduction:
    """One step's task gradients on their way over the processes, bucket by bucket.

    Args:
        replicas: The processes.
        layout: What is shared, the same on all of them.
        keep: Keep this process's share of the task gradients until `finish`, because the weights of the update are not
            known before; otherwise the update is their sum.
        update: Compute it at all.
    """

    def __init__(self, replicas: Replicas, layout: Layout, *, keep: bool = False, update: bool = True) -> None:
        self.replicas, self.layout, self.keep, self.update = replicas, layout, keep, update
        n = len(layout.tasks)
        self.gram = torch.zeros((len(layout.segments), n, n), dtype=layout.dtype, device=layout.device)
        self.total = torch.zeros(layout.width, dtype=layout.dtype, device=layout.device)
        self._starts = [s.start for s in layout.segments]
        self._kept: list[tuple[list[_Piece], Tensor]] = []

    def take(self, positions: Sequence[int], rows: Tensor | None) -> None:
        """Average the gradients of some parameters and add what follows from this process's share.

        Args:
            positions: In `layout.shared`, ascending, the same on all processes.
            rows: This process's task gradients [tasks, their parameters]; None has failed and sends zeros.
        """
        for pieces in self._filled(positions):
            share = self._exchange(pieces, rows)
            self._add_grams(pieces, share)
            if self.keep:
                self._kept.append((pieces, share))
            elif self.update:
                self._gather(pieces, share, None)

    def finish(
        self, weigh: Callable[[Tensor, Layout], Tensor] | None, kinds: Tensor, failure: Exception | None
    ) -> Tensor:
        """Complete the Gram matrices, and the update if it was kept.

        Args:
            weigh: See `Gradients.sweep`.
            kinds: Counts to be summed over the processes on the way.
            failure: What happened in this process's passes.

        Returns:
            The sums of `kinds`, on the CPU.

        Raises:
            Exception: `failure` itself; on the other processes a ProbeError.
        """
        counts = torch.cat([kinds.new_full((1,), failure is not None), kinds.flatten()]).to(self.gram)
        everything = torch.cat([self.gram.flatten(), counts])
        dist.all_reduce(everything, group=self.replicas.group)
        failed, *sums = everything[self.gram.numel() :].tolist()
        if failure is not None:
            raise failure
        if failed:
            raise ProbeError(
                f"{failed:.0f} of {self.replicas.size} processes failed in the backward pass, so this one stops too; "
                "see their messages. Nothing was added to `.grad`."
            )
        self.gram.copy_(everything[: self.gram.numel()].view(self.gram.shape))
        mark_absent(self.layout, self.gram)
        if weigh is not None:
            weights = weigh(self.gram, self.layout).to(self.total)
            dist.broadcast(weights, group=self.replicas.group, group_src=0)  # whatever was drawn at random in there
            for pieces, share in self._kept:
                self._gather(pieces, share, weights)
        return torch.tensor(sums).view(kinds.shape)

    def _filled(self, positions: Sequence[int]) -> Iterator[list[_Piece]]:
        """Group the columns into buckets."""
        room = max(BUCKET // self.layout.dtype.itemsize, self.replicas.size)
        bucket: list[_Piece] = []
        held = 0
        for piece in self._pieces(positions):
            fits = max(room // len(piece.tasks), 1)
            for offset in range(0, piece.width, fits):
                width = min(fits, piece.width - offset)
                part = _Piece(piece.column + offset, piece.start + offset, width, piece.tasks)
                size = part.share(self.replicas.size) * self.replicas.size * len(part.tasks)
                if bucket and held + size > room:
                    yield bucket
                    bucket, held = [], 0
                bucket.append(part)
                held += size
        if bucket:
            yield bucket

    def _pieces(self, positions: Sequence[int]) -> Iterator[_Piece]:
        layout, column = self.layout, 0
        piece: _Piece | None = None
        for j in positions:
            width = real_numel(layout.shared[j][1])
            tasks = layout.segments[layout.owner[j]].tasks
            if piece is not None and piece.tasks == tasks and piece.start + piece.width == layout.starts[j]:
                piece = _Piece(piece.column, piece.start, piece.width + width, tasks)
            else:
                if piece is not None:
                    yield piece
                piece = _Piece(column, layout.starts[j], width, tasks)
            column += width
        if piece is not None:
            yield piece

    def _exchange(self, pieces: Sequence[_Piece], rows: Tensor | None) -> Tensor:
        """Send every process its share of the columns; returns this one's, averaged, piece after piece."""
        size = self.replicas.size
        length = sum(len(p.tasks) * p.share(size) for p in pieces)
        packed = self.gram.new_zeros(size, length)
        offset = 0
        for p in pieces if rows is not None else ():
            assert rows is not None
            k, s = len(p.tasks), p.share(size)
            into = packed[:, offset : offset + k * s].unflatten(1, (k, s))
            columns = rows[:, p.column : p.column + p.width]
            columns = columns if k == len(self.layout.tasks) else columns[list(p.tasks)]
            full = p.width // s
            into[:full] = columns[:, : full * s].unflatten(1, (full, s)).transpose(0, 1)
            if full * s < p.width:
                into[full, :, : p.width - full * s] = columns[:, full * s :]
            offset += k * s
        packed.mul_(1 / size)
        share = packed.new_empty(length)
        self.replicas.reduced(share, packed.view(-1))
        return share

    def _blocks(self, pieces: Sequence[_Piece], share: Tensor) -> Iterator[tuple[_Piece, Tensor]]:
        """This process's averaged gradients [tasks of the piece, share], padding included."""
        size, offset = self.replicas.size, 0
        for p in pieces:
            k, s = len(p.tasks), p.share(size)
            yield p, share[offset : offset + k * s].view(k, s)
            offset += k * s

    def _add_grams(self, pieces: Sequence[_Piece], share: Tensor) -> None:
        with full_precision(self.layout.device):
            for p, block in self._blocks(pieces, share):
                s = block.shape[1]
                first = p.start + self.replicas.rank * s
                stop = min(first + s, p.start + p.width)
                at = first
                while at < stop:
                    k = bisect_right(self._starts, at) - 1
                    end = min(stop, self.layout.segments[k].stop)
                    part = block[:, at - first : end - first]
                    if len(p.tasks) == len(self.layout.tasks):
                        self.gram[k].addmm_(part, part.T)
                    else:
                        index = torch.tensor(p.tasks, device=part.device)
                        self.gram[k, index[:, None], index] += part @ part.T
                    at = end

    def _gather(self, pieces: Sequence[_Piece], share: Tensor, weights: Tensor | None) -> None:
        """Sum this process's share over the tasks, and put everyone's together."""
        mine = [
            block.sum(0) if weights is None else weights[list(p.tasks)] @ block
            for p, block in self._blocks(pieces, share)
        ]
        everyone = self.replicas.gathered(torch.cat(mine))
        for p, columns in zip(pieces, everyone.split([len(m) for m in mine], 1), strict=True):
            self.total[p.start : p.start + p.width] = columns.reshape(-1)[: p.width]
