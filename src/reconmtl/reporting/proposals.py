"""The commands that a report tells its reader to type next: the study's own with other choices."""

from __future__ import annotations

import shlex

from reconmtl.reporting.material import Material


def _repeat(material: Material, **choices: list[str] | None) -> str:
    """The command that made the study, with some options replaced; None drops one."""
    words = shlex.split(material.command) if material.command else []
    if words[:2] != ["reconmtl", "run"]:
        words = ["reconmtl", "run", material.problem or "PROBLEM"]
    groups: list[list[str]] = [[]]  # an option and its values; the first group is what stands before any
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append([name, value] if equals else [name])
        else:
            groups[-1].append(word)
    dropped = {f"--{name.replace('_', '-')}" for name in choices} | {"--overwrite", "--resume", "--progress", "--quiet"}
    kept = [word for group in groups if not (group and group[0] in dropped) for word in _joined(group)]
    added = [
        word
        for name, values in choices.items()
        if values is not None
        for word in _joined([f"--{name.replace('_', '-')}", *values])
    ]
    return shlex.join([*kept, *added])


def _joined(group: list[str]) -> list[str]:
    """A negative number needs its option's equals sign."""
    if len(group) == 2 and group[1].startswith("-"):
        return ["=".join(group)]
    return group


def other_k(material: Material) -> str:
    """Half as many layers."""
    n = len(material.plan.layers) if material.plan is not None else 10
    k = max(1, n // 2)
    return _repeat(material, methods=["single", "joint", "recon"], k=[str(k)], out=[f"runs/k{k}"])


def other_severity(material: Material) -> str:
    """Another S: a log answers that without training again."""
    s = 0.0 if material.severity < 0 else -0.1
    log = material.log_path
    if log is None:
        return _repeat(material, methods=["recon"], severity=[f"{s:g}"], out=[f"runs/s{abs(s):g}"])
    k = len(material.plan.layers) if material.plan is not None and material.plan.layers else 10
    words = ["reconmtl", "rank", str(log), *_joined(["--severity", f"{s:g}"]), "--top", str(k), "--out", "plan.json"]
    return shlex.join(words)


def longer_probe(material: Material) -> str:
    """More epochs of probing: half of the training."""
    recipe = next((r.config.get("recipe") for r in material.runs), None)
    epochs = recipe.get("epochs") if isinstance(recipe, dict) else None
    probed = max(1, epochs // 2) if isinstance(epochs, int) else 10
    return _repeat(material, methods=["recon"], probe_epochs=[str(probed)], out=["runs/longer-probe"])


def more_seeds(material: Material) -> str:
    """Three more seeds; in a study's folder, what is finished is not done again."""
    seeds = list(dict.fromkeys(r.seed for r in material.runs)) or [0]
    more = [*seeds, *range(max(seeds) + 1, max(seeds) + 4)]
    out = str(material.study) if material.study is not None else "runs/more-seeds"
    command = _repeat(material, seeds=[str(s) for s in more], out=[out])
    return f"{command} --resume" if material.study is not None else command


def control(material: Material) -> str:
    """Splits of as many layers, chosen otherwise; those that have not been tried."""
    kinds = {"random_layers": "random", "smallest": "smallest", "norms": "norms", "first": "first", "last": "last"}
    done = {r.plan.chosen.get("by") for r in material.runs if r.plan is not None}
    left = [name for by, name in kinds.items() if by not in done][:2] or ["random"]
    return _repeat(material, methods=["single", "joint", "recon", *left], out=["runs/controls"])
