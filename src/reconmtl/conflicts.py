"""What a probe recorded, and everything that follows from it without training again.

The record is, per step and layer, the upper triangle of the Gram matrix of the task gradients. Cosines, conflict scores
for any severity, rankings and the distribution of conflicts are pure functions of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reconmtl.counts import Counts
from reconmtl.errors import RunError, SeverityError
from reconmtl.files import read_json, write_bytes, write_json
from reconmtl.ranking import Ranking as Ranking

FORMAT, WITH_NULL = "reconmtl.log/1", "reconmtl.log/2"
NOISE = 1e-6
"""A layer whose gradient norm stays below this fraction of the largest layer's carries rounding noise, no signal."""

BLOCK = 2**15
"""Floats of Gram matrices that are turned into cosines at once: as many as fit a processor's cache in float64."""

TABLE_EDGES = (0.0, -0.01, -0.02, -0.03)
"""Bin edges of the paper's Table 6."""


def check_severity(severity: float) -> None:
    """Raise a SeverityError unless severity is in (-1, 0]."""
    if not isinstance(severity, (int, float)) or isinstance(severity, bool) or not -1 < severity <= 0:
        raise SeverityError(f"Severity S = {severity!r} is outside (-1, 0]; the paper uses values from -0.1 to 0.")


def cosines_from_grams(grams: Tensor, tasks: int) -> Tensor:
    """Turn packed Gram matrices into cosine similarities.

    Args:
        grams: Upper triangles with the diagonal, row by row, [..., tasks * (tasks + 1) / 2].
        tasks: Number of tasks.

    Returns:
        Cosines of the pairs i < j in lexicographic order, [..., tasks * (tasks - 1) / 2], dtype of `grams`; NaN where a
        gradient is zero or absent.
    """
    rows, columns = torch.triu_indices(tasks, tasks)
    diagonal = (rows == columns).nonzero().flatten()
    pairs = (rows != columns).nonzero().flatten()
    first, second = rows[pairs], columns[pairs]
    flat = grams.reshape(-1, grams.shape[-1])
    out = grams.new_empty(flat.shape[0], len(pairs))
    block = max(1, BLOCK // max(flat.shape[1], 1))
    for part, into in zip(flat.split(block), out.split(block), strict=True):
        norms = part.index_select(1, diagonal).double().sqrt_()
        product = norms.index_select(1, first).mul_(norms.index_select(1, second))
        cosines = part.index_select(1, pairs).double().div_(product)
        cosines[~(product > 0)] = math.nan
        into.copy_(cosines.clamp_(-1, 1))
    return out.view(*grams.shape[:-1], len(pairs))


def conflict_scores(cosines: Tensor, *, severity: float) -> Tensor:
    """Count, per layer, how often two tasks' gradients conflict.

    Args:
        cosines: Cosine similarity of each task pair, [steps, layers, pairs], in [-1, 1]; NaN where a gradient was zero.
        severity: A pair conflicts when its cosine is strictly below this; the paper's S, in (-1, 0].

    Returns:
        Conflicts per layer, [layers], int64, summed over steps and pairs.

    Raises:
        SeverityError: If severity is outside (-1, 0].

    Reference: Shi et al., Recon, ICLR 2023, Definition 3.
    """
    check_severity(severity)
    # The threshold is rounded to the dtype of the cosines: a float32 cosine that prints as -0.1 is not below -0.1.
    threshold = torch.tensor(severity, dtype=cosines.dtype)
    return (cosines < threshold).sum(dim=(0, 2))


def distribution(cosines: Tensor, *, edges: Sequence[float] = TABLE_EDGES) -> Tensor:
    """Share of gradient pairs in each interval between falling edges, as in the paper's Table 6.

    Args:
        cosines: Any shape; NaN is left out.
        edges: Falling edges e1 > e2 > ...; the intervals are [1, e1], (e1, e2], ..., (en, -1]: a cosine that equals an
            edge belongs to the interval that ends there.

    Returns:
        Shares [len(edges) + 1] that sum to 1, float64; NaN if there is no cosine at all.

    Reference: Shi et al., Recon, ICLR 2023, Tables 6 and 8-10.
    """
    values = cosines[~cosines.isnan()]
    below = torch.stack([(values < torch.tensor(e, dtype=values.dtype)).sum() for e in edges]).double()
    counts = torch.cat([torch.tensor([values.numel()]).double(), below])
    counts = counts - torch.cat([counts[1:], counts.new_zeros(1)])
    return counts / values.numel() if values.numel() else torch.full_like(counts, math.nan)


def share_below(cosines: Tensor, threshold: float) -> float:
    """Share of gradient pairs strictly below a threshold, in [0, 1]; NaN if there is none."""
    return float(distribution(cosines, edges=[threshold])[1])


def norms_squared(grams: Tensor, tasks: int) -> Tensor:
    """Squared gradient norms [..., tasks], float64, of packed Gram matrices."""
    rows, columns = torch.triu_indices(tasks, tasks)
    return grams[..., rows == columns].double()


def whole_cosines(grams: Tensor, tasks: int) -> Tensor:
    """Cosines of the concatenation of all layers, [steps, pairs], from packed Grams [steps, layers, ...]."""
    absent = grams.isnan()
    total = torch.where(absent, 0.0, grams.double()).sum(1)
    total[absent.all(1)] = math.nan
    return cosines_from_grams(total, tasks).to(grams.dtype)


def count(grams: Tensor, tasks: int) -> Counts:
    """Count the cosines of packed Gram matrices [steps, layers, ...] as one window."""
    return Counts.of(cosines_from_grams(grams, tasks), whole_cosines(grams, tasks), norms_squared(grams, tasks))


class ConflictLog:
    """Gram matrices of task gradients, per measured step and shared layer; or, of long recordings, exact counts.

    Args:
        record: Upper triangles with the diagonal, [steps, layers, tasks * (tasks + 1) / 2], float32 or float64 on the
            CPU; NaN for tasks that do not reach a layer in a step. Or the Counts that replace them where they would
            exceed a bound: scores at multiples of 0.001 stay exact, single cosines are gone.
        tasks: Task names, in the order of the Gram matrices.
        layers: Names of the shared layers, in network order.
        sizes: Parameters of each layer that are shared.
        types: Class name of each layer.
        every: One of how many training steps was measured.
        null: The same for the gradients of one half of each batch less those of the other, if they were recorded: what
            the batch's noise alone does, see `nulls.excess`. It may have fewer steps.
    """

    def __init__(
        self,
        record: Tensor | Counts,
        *,
        tasks: Sequence[str],
        layers: Sequence[str],
        sizes: Mapping[str, int],
        types: Mapping[str, str],
        every: int = 1,
        null: ConflictLog | None = None,
    ) -> None:
        expected = (len(layers), len(tasks) * (len(tasks) + 1) // 2)
        grams = record if isinstance(record, Tensor) else torch.empty(0, *expected)
        pairs = (len(layers), len(tasks) * (len(tasks) - 1) // 2)
        if isinstance(record, Counts) and tuple(record.pairs.shape[:2]) != pairs:
            raise RunError(f"Expected counts of {pairs} layers and pairs, got {list(record.pairs.shape[:2])}.")
        if grams.ndim != 3 or tuple(grams.shape[1:]) != expected:
            raise RunError(f"Expected Grams of shape [steps, {expected[0]}, {expected[1]}], got {list(grams.shape)}.")
        self._grams = grams
        self.counts = record if isinstance(record, Counts) else None
        self.tasks = tuple(tasks)
        self.layers = tuple(layers)
        self.sizes = {n: int(sizes[n]) for n in layers}
        self.types = {n: types[n] for n in layers}
        self.every = every
        self.null = null
        if null is not None and (null.tasks != self.tasks or null.layers != self.layers):
            raise RunError("Expected a null of the same tasks and layers.")

    @property
    def grams(self) -> Tensor:
        """The Gram matrices.

        Raises:
            RunError: If the log holds counts.
        """
        if self.counts is not None:
            raise RunError(
                f"This log of {self.steps} steps holds counts of cosines, not Gram matrices: those would have exceeded "
                "the bound. Ask for scores, `pair_scores`, `whole` or `window`, or record fewer steps with `every`."
            )
        return self._grams

    @property
    def network_layers(self) -> tuple[str, ...]:
        """Shared layers in network order, as `Plan`'s controls ask for them."""
        return self.layers

    @property
    def steps(self) -> int:
        """Number of measured steps."""
        return self._grams.shape[0] if self.counts is None else self.counts.steps

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Task pairs, in the order of the last dimension of `cosines()`."""
        return [(a, b) for i, a in enumerate(self.tasks) for b in self.tasks[i + 1 :]]

    def __repr__(self) -> str:
        return f"ConflictLog({self.steps} steps, {len(self.layers)} layers, tasks={list(self.tasks)})"

    def cosines(self) -> Tensor:
        """Cosine similarity of each task pair, [steps, layers, pairs]; NaN where a gradient was zero or absent."""
        return cosines_from_grams(self.grams, len(self.tasks))

    def whole(self) -> Tensor:
        """Cosines over the concatenation of all shared parameters, [steps, pairs]; cos phi_ij of Definition 1.

        A log of counts gives one value per counted cosine instead, [number, 1], the middle of its bin of 0.001: shares
        below any multiple of 0.001 are exact.
        """
        if self.counts is not None:
            return self.counts.whole_values()[:, None]
        return whole_cosines(self.grams, len(self.tasks))

    def scores(self, *, severity: float) -> Tensor:
        """S-conflict score of each layer, [layers], int64; see `conflict_scores` and `score_errors`."""
        check_severity(severity)
        if self.counts is not None:
            return self.counts.below(severity)[0]
        return conflict_scores(self.cosines(), severity=severity)

    def score_errors(self, *, severity: float) -> Tensor:
        """Largest error of each score, [layers], int64: zero, unless counts are asked between multiples of 0.001."""
        check_severity(severity)
        if self.counts is not None:
            return self.counts.below(severity)[1]
        return torch.zeros(len(self.layers), dtype=torch.int64)

    def pair_scores(self, *, severity: float) -> Tensor:
        """Conflicts of each pair of tasks at each layer, [layers, pairs], int64, over all steps.

        A log of counts keeps pairs on a grid of 0.05 and interpolates between.

        Raises:
            SeverityError: If severity is outside (-1, 0].
        """
        check_severity(severity)
        if self.counts is not None:
            return self.counts.pairs_below(severity)[0]
        cosines = self.cosines()
        return (cosines < torch.tensor(severity, dtype=cosines.dtype)).sum(0)

    def noise(self) -> Tensor:
        """Layers whose gradients are rounding noise, [layers], bool: norms below 1e-6 of the largest layer's.

        A convolution's bias in front of a BatchNorm is the usual case: its gradient is zero but for rounding.
        """
        if self.counts is not None:
            power = self.counts.power
        else:
            power = norms_squared(self.grams, len(self.tasks)).nanmean(dim=(0, 2)).nan_to_num()
        return power.sqrt() < NOISE * power.max().sqrt()

    def window(self, start: int, stop: int) -> ConflictLog:
        """The same log restricted to measured steps start <= step < stop; its null too if that has as many steps.

        Raises:
            RunError: If the log holds counts and these are no borders of its windows.
        """
        part = self._with(self._grams[start:stop] if self.counts is None else self.counts.window(start, stop))
        alike = self.null is not None and self.null.steps == self.steps
        return part.with_null(self.null.window(start, stop)) if self.null is not None and alike else part

    def with_null(self, null: ConflictLog | None) -> ConflictLog:
        """The same log with another null, or none."""
        return self._with(self._grams if self.counts is None else self.counts, null)

    def counted(self) -> ConflictLog:
        """The same log with counts in place of Gram matrices."""
        null = None if self.null is None else self.null.counted()
        return self if self.counts is not None else self._with(count(self.grams, len(self.tasks)), null)

    def _with(self, record: Tensor | Counts, null: ConflictLog | None = None) -> ConflictLog:
        return ConflictLog(
            record,
            tasks=self.tasks,
            layers=self.layers,
            sizes=self.sizes,
            types=self.types,
            every=self.every,
            null=null,
        )

    def rank(self, *, severity: float) -> Ranking:
        """Order the layers by their S-conflict score, most conflicts first; ties keep network order.

        Raises:
            SeverityError: If severity is outside (-1, 0].

        Reference: Shi et al., Recon, ICLR 2023, Algorithm 1.
        """
        scores = self.scores(severity=severity).tolist()
        possible = self.steps * len(self.pairs)
        error = int(self.score_errors(severity=severity).max()) if self.layers else 0
        scored = dict(zip(self.layers, scores, strict=True))
        return Ranking(self, scored, severity=severity, possible=possible, error=error)

    def merge(self, others: Sequence[ConflictLog]) -> ConflictLog:
        """Append the steps of other logs (other seeds, say) of the same tasks and layers; nulls too if all have one.

        Raises:
            RunError: If tasks or layers differ.
        """
        for other in others:
            if other.tasks != self.tasks or other.layers != self.layers or other.sizes != self.sizes:
                raise RunError("Only logs of the same tasks and layers can be merged; these differ.")
        nulls = [log.null for log in others if log.null is not None]
        null = self.null.merge(nulls) if self.null is not None and len(nulls) == len(others) else None
        if all(log.counts is None for log in (self, *others)):
            return self._with(torch.cat([self.grams, *(o.grams for o in others)]), null)
        total, *rest = (log.counted().counts for log in (self, *others))
        for part in rest:
            assert total is not None  # counted() logs hold counts
            assert part is not None
            total = total.added(part)
        assert total is not None
        return self._with(total, null)

    def save(self, path: str | Path) -> None:
        """Write the log into a folder: `log.json`, `grams.safetensors` or `counts.safetensors`, and a null beside it.

        Only a log with a null has the newer format: what knows nothing of nulls refuses it.
        """
        folder = Path(path)
        kind = self._save(folder)
        about: dict[str, object] = {}
        if self.null is not None:
            about = {"null": {"record": self.null._save(folder, "null-"), "steps": self.null.steps}}
        write_json(
            folder / "log.json",
            {
                "format": FORMAT if self.null is None else WITH_NULL,
                "tasks": list(self.tasks),
                "layers": [{"name": n, "parameters": self.sizes[n], "type": self.types[n]} for n in self.layers],
                "every": self.every,
                "record": kind,
                "steps": self.steps,
                **about,
            },
        )

    def _save(self, folder: Path, prefix: str = "") -> str:
        """Write the record and return its kind."""
        kind = "grams" if self.counts is None else "counts"
        content = {"grams": self._grams.contiguous()} if self.counts is None else self.counts.tensors()
        write_bytes(folder / f"{prefix}{kind}.safetensors", lambda temporary: save_file(content, temporary))
        return kind

    @classmethod
    def load(cls, path: str | Path) -> ConflictLog:
        """Read a log; damage is a RunError that names the file and the field."""
        folder = Path(path)
        source = folder / "log.json"
        data = read_json(source, RunError)
        if not isinstance(data, dict) or data.get("format") not in (FORMAT, WITH_NULL):
            raise RunError(f"{source}: field 'format' should be {FORMAT!r} or {WITH_NULL!r}.")
        tasks, layers, every = data.get("tasks"), data.get("layers"), data.get("every")
        if not isinstance(tasks, list) or not all(isinstance(t, str) for t in tasks):
            raise RunError(f"{source}: field 'tasks' should be a list of names.")
        if not isinstance(layers, list) or not all(
            isinstance(e, dict)
            and isinstance(e.get("name"), str)
            and type(e.get("parameters")) is int
            and 0 <= e["parameters"] < 2**53
            and isinstance(e.get("type"), str)
            for e in layers
        ):
            raise RunError(f"{source}: field 'layers' should list objects with name, parameters and type.")
        if type(every) is not int or not 1 <= every < 2**53:
            raise RunError(f"{source}: field 'every' should be a positive whole number.")
        about = data.get("null")
        if (data["format"] == WITH_NULL) != isinstance(about, dict):
            raise RunError(
                f"{source}: field 'null' should be an object with record and steps, and only in {WITH_NULL}."
            )
        record = _read(folder, source, data)
        noise = None if about is None else _read(folder, source, about, "null-")
        shape: dict[str, Any] = {
            "tasks": tasks,
            "layers": [e["name"] for e in layers],
            "sizes": {e["name"]: e["parameters"] for e in layers},
            "types": {e["name"]: e["type"] for e in layers},
            "every": every,
        }
        try:
            return cls(record, **shape, null=None if noise is None else cls(noise, **shape))
        except (RunError, KeyError) as cause:
            raise RunError(f"{source} and the records beside it do not belong together: {cause}") from None


def _read(folder: Path, source: Path, about: Mapping[str, Any], prefix: str = "") -> Tensor | Counts:
    """A record as `log.json` tells of it."""
    kind = about.get("record", "grams")
    if kind not in ("grams", "counts"):
        raise RunError(f"{source}: field 'record' should be 'grams' or 'counts'.")
    file = folder / f"{prefix}{kind}.safetensors"
    record: Tensor | Counts
    try:
        content = load_file(file)
        record = content["grams"] if kind == "grams" else Counts.from_tensors(content)
    except FileNotFoundError:
        raise RunError(f"There is no file {file}.") from None
    except (OSError, KeyError, SafetensorError, RunError) as cause:
        raise RunError(
            f"{file} cannot be read as a log's {'Gram matrices' if kind == 'grams' else 'counts'}: {cause}."
        ) from None
    steps = record.steps if isinstance(record, Counts) else record.shape[0] if record.ndim == 3 else None
    if steps != about.get("steps") or (isinstance(record, Tensor) and not record.is_floating_point()):
        found = list(record.shape) if isinstance(record, Tensor) else f"{steps} steps"
        raise RunError(f"{file}: expected [{about.get('steps')}, layers, pairs] floats, found {found}.")
    return record
