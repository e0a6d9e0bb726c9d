"""What people read: tables of a comparison, of a ranking, and of the distribution of conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from reconmtl.comparing import Comparison, Row, grid, readable
from reconmtl.conflicts import TABLE_EDGES, Ranking, distribution
from reconmtl.nulls import Excess
from reconmtl.plan import Plan


def layers_table(ranking: Ranking, plan: Plan, beyond: Excess | None = None) -> str:
    """List the chosen layers, most conflicts first.

    Columns: name (with a mark if its gradients are rounding noise), rank, type, parameters, conflicts, and their share
    of the gradient pairs that were measured at this layer; with `beyond` also the share that chance gives, what is
    beyond it (points), its p, and the rank by that.
    """
    more: dict[str, list[str]] = {}
    if beyond is not None:
        again = {n: str(i) for i, n in enumerate(beyond.order, start=1)}
        for name, chance, rest, p in beyond.rows():
            told = [readable(100 * chance, digits=1), readable(100 * rest, digits=1, sign=True)]
            more[name] = [*told, "n/a" if math.isnan(p) else f"{p:.3f}", again[name]]
    rows = [
        [
            f"{name} (rounding noise)" if name in ranking.noise else name,
            f"{i}",
            ranking.types[name],
            f"{ranking.sizes[name]:,}",
            f"{score}",
            readable(100 * score / measured if measured else math.nan, digits=1),
            *more.get(name, []),
        ]
        for i, (name, score, measured) in enumerate(
            zip(ranking.layers, ranking.scores, ranking.measured, strict=True), start=1
        )
        if name in plan.layers
    ]
    titles = ["layer", "rank", "type", "parameters", "conflicts", "% of pairs"]
    return grid(titles + (["by chance (%)", "beyond", "p", "rank beyond"] if more else []), rows)


def conflicts_table(
    rows: Sequence[Row], *, edges: Sequence[float] = TABLE_EDGES, reference: str = "joint"
) -> str | None:
    """Show the distribution of cosines over the whole shared vector, a column per method, as the paper's Table 6 does.

    Args:
        rows: Of a comparison; those without a record are left out.
        edges: Falling bin edges; the first bin holds the pairs without conflict.
        reference: Label of the row that the reduction of the tail below `edges[1]` is relative to.

    Returns:
        The table in percent, or None if nothing was recorded.
    """
    recorded = [r for r in rows if any(run.log is not None for run in r.runs)]
    if not recorded:
        return None
    shares = {}
    for row in recorded:
        whole = torch.cat([run.log.whole() for run in row.runs if run.log is not None])
        shares[row.label] = 100 * distribution(whole, edges=edges)
    ends = ["1", *(f"{e:g}" for e in edges), "-1"]
    body = [
        [
            f"{'[' if i == 0 else '('}{ends[i]}, {ends[i + 1]}]",
            *(readable(float(s[i]), digits=2) for s in shares.values()),
        ]
        for i in range(len(edges) + 1)
    ]
    base = shares.get(reference)
    if base is not None and len(edges) > 1:
        tail = float(base[2:].sum())
        body.append(
            [
                f"reduction below {edges[1]:g} (%)",
                *(
                    "-" if n == reference or not tail else readable(100 * (1 - float(s[2:].sum()) / tail), digits=1)
                    for n, s in shares.items()
                ),
            ]
        )
    return grid(["cos of the whole shared gradient", *shares], body)


def summary(comparison: Comparison, ranking: Ranking, plan: Plan, facts: Sequence[str]) -> str:
    """Write the whole result of a study as text that is also Markdown.

    Args:
        comparison: Methods side by side.
        ranking: What the probe found.
        plan: What was split.
        facts: Lines under the table: seeds, epochs, scale, caveats.
    """
    parts = [str(comparison), "\n".join(facts)]
    conflicts = conflicts_table(comparison.rows)
    if conflicts is not None:
        steps = {r.label: [run.log.steps for run in r.runs if run.log is not None] for r in comparison.rows}
        counted = ", ".join(f"{label} {max(n)}" for label, n in steps.items() if n)
        parts.append(f"{conflicts}\n\nMeasured steps per seed: {counted}.")
    least, most = min(ranking.measured), max(ranking.measured)
    pairs = f"{most}" if least == most else f"{least} to {most}"
    parts.append(f"Layers chosen by the probe (S = {ranking.severity:g}, {pairs} measured gradient pairs per layer):")
    parts.append(layers_table(ranking, plan))
    return "\n\n".join(parts)
