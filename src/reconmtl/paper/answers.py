"""What the results say: the answer to the central question, and where they and the paper disagree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reconmtl.comparing import Spread
from reconmtl.formats import grid, readable
from reconmtl.paper.published import agreement

SURE = 0.05
"""The p below which a difference is called one."""
CHOICES = (
    "random layers",
    "random layers, as many parameters",
    "smallest layers",
    "all norms",
    "least conflicts",
)
"""Ways to split that Recon's is compared with."""
WIDER = ("wider, parameters", "wider, operations")


@dataclass(frozen=True)
class Claim:
    """A number of the paper beside ours.

    Attributes:
        what: It is, e.g. "gain by Recon, MGDA".
        ours: Over seeds.
        printed: The paper's.
        signed: Whether its sign says something; distances have none.
    """

    what: str
    ours: Spread
    printed: float
    signed: bool = True

    @property
    def agrees(self) -> str:
        """Of numbers with a sign "sign and size", "sign" or "no"; of others "size" or "no"."""
        found = agreement(self.ours.mean, self.printed)
        if self.signed:
            return found
        return {"sign and size": "size"}.get(found, "no")


@dataclass(frozen=True)
class Answered:
    """A row of the central question.

    Attributes:
        gain: Delta-m over joint training, in percent.
        megabytes: Added parameters.
        p: Of the paired test against Recon at the same setting of the statistics; None of Recon itself.
    """

    gain: Spread
    megabytes: float
    p: float | None


BY_FIRST = ("first layer alone", "recon but the first layer", "random layers and the first")
"""Ways that tell what splitting the first layer does from what the choice of the others does."""


def answer(found: Mapping[str, Answered]) -> str:
    """Three sentences on whether it matters which layers are split; "" as long as too little is finished.

    Args:
        found: Row -> what it gains and costs; "recon" and "joint" among them.
    """
    recon, others = found.get("recon"), [n for n in CHOICES if n in found]
    if recon is None or not others:
        return ""

    compared = [*others, *(n for n in WIDER if n in found)]
    sentences = [
        f"With statistics per task, splitting Recon's layers gains {recon.gain.show(1, sign=True)} Δm over joint "
        f"training for {readable(recon.megabytes, digits=3)} MB (n = {recon.gain.n}), "
        f"{', '.join(_told(n, found[n]) for n in compared)}."
    ]
    open_ = [n for n in compared if 2 ** (1 - found[n].gain.n) > SURE]
    worse = [n for n in compared if n not in open_ and found[n].gain.mean < recon.gain.mean]
    better = [n for n in worse if (p := found[n].p) is not None and p < SURE]
    not_better = [n for n in compared if n not in (*better, *open_)]
    best = max(others, key=lambda n: found[n].gain.mean)
    lead, share = recon.gain.mean - found[best].gain.mean, found[best].gain.mean / recon.gain.mean
    unknown = f" (too few seeds to tell: {_all(open_)})" if open_ else ""
    sentences.append(
        f"In paired tests (sign flips over seeds, p < {SURE:g}) Recon is better than {_all(better)}, and not than "
        f"{_all(not_better)}{unknown}; the best of these other choices, *{best}*, has {100 * share:.0f} % of its gain, "
        f"so that Recon's adds {readable(lead, digits=1, sign=True)} Δm to splitting as such."
    )
    mixed = {n: found[f"{n} (shared statistics)"] for n in ("recon", *others) if f"{n} (shared statistics)" in found}
    if "recon" in mixed and "random layers" in mixed and "random layers" in found:
        rows = ", ".join(f"*{n}* {row.gain.show(1, sign=True)} (n = {row.gain.n})" for n, row in mixed.items())
        with_shared = mixed["recon"].gain.mean - mixed["random layers"].gain.mean
        per_task = recon.gain.mean - found["random layers"].gain.mean
        sentences.append(
            f"With shared statistics, as published, the gains are {rows}: Recon's lead over random layers is "
            f"{with_shared:.1f} Δm there and {per_task:.1f} with statistics per task."
        )
    return " ".join(sentences)


def by_first_layer(found: Mapping[str, Answered]) -> str:
    """A sentence on what splitting the network's first layer does; "" as long as too little is finished."""
    if not all(n in found for n in (*BY_FIRST, "recon", "random layers")):
        return ""
    alone, without, with_it = (_told(n, found[n]) for n in BY_FIRST)
    recon, drawn = (found[n].gain.show(1, sign=True) for n in ("recon", "random layers"))
    return (
        f"What the network's first layer does: {alone}; {without}, against {recon} of *recon*; {with_it}, against "
        f"{drawn} of *random layers* (p: paired, against *recon*). Behind a first layer that is split, every layer "
        "sees values of the task's own, at the operations of a network per task."
    )


def _told(name: str, row: Answered) -> str:
    seeds = f"n = {row.gain.n}" if row.p is None else f"n = {row.gain.n}, p = {row.p:.2g}"
    return f"*{name}* {row.gain.show(1, sign=True)} for {readable(row.megabytes, digits=3)} MB ({seeds})"


def _all(names: Sequence[str]) -> str:
    return ", ".join(f"*{n}*" for n in names) if names else "none of them"


def disagreements(found: Mapping[str, Sequence[Claim]]) -> str:
    """Markdown: how much agrees per experiment, then every number that does not.

    Args:
        found: Experiment -> its numbers.
    """
    counts, lines = [], []
    for name, claims in found.items():
        said = [c for c in claims if c.agrees]
        if not said:
            continue
        n = Counter(c.agrees for c in said)
        counts.append([name, str(len(said)), str(n["sign and size"] + n["size"]), str(n["sign"]), str(n["no"])])
        lines += [_line(name, c) for c in sorted(said, key=lambda c: c.agrees) if c.agrees in ("no", "sign")]
    if not counts:
        return ""
    return "\n\n".join(
        [
            grid(["experiment", "numbers", "agree", "in sign only", "not at all"], counts),
            "A size agrees within a factor of two. What does not agree, and how far it is from the paper's number in "
            "deviations of ours over seeds:",
            grid(["experiment", "number", "ours", "n", "paper's", "agrees", "off by sd"], lines),
        ]
    )


def _line(name: str, claim: Claim) -> list[str]:
    ours, off = claim.ours, abs(claim.ours.mean - claim.printed) / claim.ours.sd if claim.ours.sd else math.nan
    known = math.isfinite(ours.sd)
    return [
        name,
        claim.what,
        ours.show(2, sign=claim.signed) if known else readable(ours.mean, digits=2, sign=claim.signed),
        str(ours.n),
        readable(claim.printed, digits=2, sign=claim.signed),
        claim.agrees,
        f"{off:.1f}" if known else "",
    ]
