"""What a plan costs, without building the split model."""

from dataclasses import dataclass

from torch import nn

from reconmtl.errors import SplitError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting.refusals import check_model
from reconmtl.splitting.splitter import resolve
from reconmtl.splitting.storage import record

BYTES_PER_PARAMETER = 4  # fp32, as the paper counts
MEGABYTE = 2**20


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        parameters: Elements of all parameters, tied ones once.
        megabytes: Of these parameters in fp32, in units of 2**20 bytes.
    """

    parameters: int
    megabytes: float


def cost(model: nn.Module, plan: Plan | None = None, *, sample: object = None) -> Cost:
    """Size of a model, or of what `split(model, plan)` would return, without building it.

    Args:
        model: Any module; a split one without a plan.
        plan: The plan to price.
        sample: Not used yet.

    Returns:
        Parameters and megabytes.

    Raises:
        LayerMatchError: If a name of the plan matches no layer.
        SplitError: If the model is split already and a plan is given.

    Example:
        >>> cost(nn.Linear(10, 10), Plan(tasks=["a", "b", "c"], layers=["(root)"])).parameters
        330
    """
    total = sum(p.numel() for p in model.parameters())
    if plan is not None:
        if record(model) is not None:
            raise SplitError("This model is split already; give the original model with the plan, or no plan.")
        check_model(model, plan)
        planned = resolve(model, plan)
        sizes = {layer.name: layer.numel for layer in find_layers(model)}
        total += sum(sizes.get(name, 0) * (len(groups) - 1) for name, groups in planned.items())
    del sample
    return Cost(parameters=total, megabytes=total * BYTES_PER_PARAMETER / MEGABYTE)
