"""What a check of a problem found: faults, warnings, and the table of the network's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from reconmtl.comparing import grid

FORMAT = "reconmtl.check/1"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a problem, or that its author should know.

    Attributes:
        about: What it concerns: "model", "train", "task 'seg'" ...
        says: What was found and what to do.
        severity: "fault" stops a training or makes its result wrong; "warning" may be meant so.
    """

    about: str
    says: str
    severity: Literal["fault", "warning"] = "fault"

    def __str__(self) -> str:
        return f"{'✗' if self.severity == 'fault' else '!'} {self.about}: {self.says}"


@dataclass(frozen=True)
class CheckedLayer:
    """One row of the layer table.

    Attributes:
        name: Of the layer, as plans name it.
        type: Class of the module.
        parameters: Their number.
        tasks: Whose losses reach it.
        splittable: Whether it can get one copy per task.
        why: If not, the reason.
    """

    name: str
    type: str
    parameters: int
    tasks: tuple[str, ...]
    splittable: bool
    why: str = ""


@dataclass(frozen=True)
class Checked:
    """What `check` found; `print` it.

    Attributes:
        problem: Its name.
        tasks: Names of its tasks.
        findings: Everything that was found, faults first.
        targets: Data set -> task -> samples of the batch with a target.
        samples: Data set -> samples of the batch (of the largest one, where tasks have data of their own).
        layers: The network's layers, in network order; empty if the network could not be run.
    """

    problem: str
    tasks: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    targets: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[CheckedLayer, ...] = ()

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What stops a training or makes its result wrong."""
        return tuple(f for f in self.findings if f.severity == "fault")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may be meant so."""
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data."""
        return {
            "format": FORMAT,
            "problem": self.problem,
            "tasks": list(self.tasks),
            "ok": self.ok,
            "findings": [asdict(f) for f in self.findings],
            "samples": dict(self.samples),
            "targets": {what: dict(counts) for what, counts in self.targets.items()},
            "layers": [asdict(layer) | {"tasks": list(layer.tasks)} for layer in self.layers],
        }

    def table(self) -> str:
        """The layers as a Markdown table, with the longer reasons below it."""
        rows, notes = [], []
        for layer in self.layers:
            by = "all" if set(layer.tasks) == set(self.tasks) else ", ".join(layer.tasks) or "none"
            why = "yes" if layer.splittable else "no: " + layer.why
            if len(why) > 40:
                notes.append(f"- {layer.name}: {layer.why}")
                why = "no, see below"
            rows.append([layer.name, layer.type, f"{layer.parameters:,}", by, why])
        return "\n".join([grid(["layer", "type", "parameters", "reached by", "splittable"], rows), *notes])

    def __str__(self) -> str:
        counts = [number_of(len(self.faults), "fault"), number_of(len(self.warnings), "warning")]
        lines = [f"{self.problem}: {', '.join(counts)}.", *map(str, self.findings)]
        for what, n in self.samples.items():
            absent = [f"{t} on {self.targets[what].get(t, 0)}" for t in self.tasks if self.targets[what].get(t, 0) < n]
            told = f"; targets are there for {', '.join(absent)}" if absent else ", each with every target"
            lines.append(f"{what}: looked at {number_of(n, 'sample')}{told}.")
        if self.layers:
            able = [layer for layer in self.layers if layer.splittable]
            size = sum(layer.parameters for layer in able)
            lines += ["", self.table(), "", f"{number_of(len(able), 'layer')} with {size:,} parameters can be split."]
        return "\n".join(lines)


def number_of(n: int, what: str) -> str:
    """A number with its noun, e.g. '1 fault', '2 faults'."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
