"""Find the layers that tasks fight over, and give just those one copy per task.

    import reconmtl as rm

    log = rm.probe(problem, epochs=30)              # watch training, record how the tasks' gradients relate
    plan = log.rank(severity=-0.1).top(25)          # the 25 layers with most conflicts
    runs = rm.fit(problem, plan=plan, seeds=(0, 1, 2))
    print(rm.compare([*rm.fit(problem, method="single"), *runs]))

Reference: Shi et al., Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning, ICLR 2023.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reconmtl.version import __version__

if TYPE_CHECKING:
    from reconmtl.balance import Balancer
    from reconmtl.checking import check_probe, layer_table
    from reconmtl.comparing import compare, delta_m
    from reconmtl.conflicts import ConflictLog
    from reconmtl.errors import ReconError
    from reconmtl.evaluation import Machine
    from reconmtl.faults import check
    from reconmtl.plan import Plan
    from reconmtl.probing import Probe
    from reconmtl.problem import Metric, Problem, Recipe, Task
    from reconmtl.ranking import Ranking
    from reconmtl.reporting import report
    from reconmtl.runs import Run
    from reconmtl.splitting import check_optimizer, cost, split, split_optimizer, verify, view
    from reconmtl.train import fit, open_run, probe

# Names are imported on first use, so that `reconmtl --help` needs no torch.
_HOME = {
    "Balancer": "balance",
    "ConflictLog": "conflicts",
    "Machine": "evaluation",
    "Metric": "problem",
    "Plan": "plan",
    "Probe": "probing",
    "Problem": "problem",
    "Ranking": "ranking",
    "Recipe": "problem",
    "ReconError": "errors",
    "Run": "runs",
    "Task": "problem",
    "check": "faults",
    "check_optimizer": "splitting",
    "check_probe": "checking",
    "compare": "comparing",
    "cost": "splitting",
    "delta_m": "comparing",
    "fit": "train",
    "layer_table": "checking",
    "open_run": "train",
    "probe": "train",
    "report": "reporting",
    "split": "splitting",
    "split_optimizer": "splitting",
    "verify": "splitting",
    "view": "splitting",
}

__all__ = [
    "Balancer",
    "ConflictLog",
    "Machine",
    "Metric",
    "Plan",
    "Probe",
    "Problem",
    "Ranking",
    "Recipe",
    "ReconError",
    "Run",
    "Task",
    "__version__",
    "check",
    "check_optimizer",
    "check_probe",
    "compare",
    "cost",
    "delta_m",
    "fit",
    "layer_table",
    "open_run",
    "probe",
    "report",
    "split",
    "split_optimizer",
    "verify",
    "view",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 any public name
    if name not in _HOME:
        raise AttributeError(f"module 'reconmtl' has no attribute {name!r}")
    return getattr(import_module(f"reconmtl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
