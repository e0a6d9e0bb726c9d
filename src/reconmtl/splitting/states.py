"""State dicts of split models: which names became which, the plan inside, unsplit checkpoints."""

from collections.abc import Mapping
from typing import cast

from torch import nn

from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting.adapted import EXTRA, read_extra_state
from reconmtl.splitting.storage import COPIES, copies, record
from reconmtl.splitting.structure import Value


def saved_plan(source: nn.Module | Mapping[str, Value]) -> Plan:
    """The plan that a split model, or its state dict, was split with.

    With it a checkpoint is loaded without the plan at hand: `split(model, saved_plan(state)).load_state_dict(state)`.

    Args:
        source: A split model, or the state dict of one.

    Returns:
        The plan, layer names resolved.

    Raises:
        SplitError: If there is no plan in it.
    """
    if isinstance(source, nn.Module):
        rec = record(source)
        if rec is None or rec.root is None:
            raise SplitError("This model was not returned by `split`, so that it holds no plan.")
        return Plan.from_dict(rec.root.plan, source="the split model")
    if EXTRA not in source:
        raise SplitError(f"This state has no {EXTRA!r}: it is the state of an unsplit model (or of a part of one).")
    return Plan.from_dict(read_extra_state(source[EXTRA])["plan"], source="the state dict")


def load_shared(split_model: nn.Module, state: Mapping[str, Value]) -> dict[str, list[str]]:
    """Load an unsplit model's checkpoint into a split model: every copy of a layer gets the layer's values.

    `split_model.load_state_dict(state)` does the same, without the report.

    Args:
        split_model: What `split` returned.
        state: State dict of the unsplit model.

    Returns:
        {key of the checkpoint: keys of the copies that it was expanded to}, for the split layers.

    Raises:
        RuntimeError: From PyTorch, if keys are missing or unexpected.
    """
    split_model.load_state_dict(dict(state))
    report = {}
    for name, module in split_model.named_modules():
        rec = record(module)
        if rec is None:
            continue
        prefix = f"{name}." if name else ""
        for own, groups in ((rec.params, rec.param_groups), (rec.buffers, rec.buffer_groups)):
            for key in own:
                if prefix + key in state:
                    labels = [rec.family.label(m) for m in groups]
                    report[prefix + key] = [f"{prefix}{COPIES}.{label}.{key}" for label in labels]
    return report


def copies_of(model: nn.Module, split_model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """For each parameter of an unsplit model, the parameters that it became in the split one.

    Returns:
        {name in the model: {name in the split model: parameter}}.

    Raises:
        SplitError: If the models do not belong together.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    kept = dict(split_model.named_parameters())
    for name, p in model.named_parameters():
        if name in kept:
            found[name] = {name: kept[name]}
        else:
            owner, _, key = name.rpartition(".")
            try:
                module = split_model.get_submodule(owner)
            except AttributeError:
                module = nn.Module()
            rec = record(module)
            if rec is None or key not in rec.params:
                raise SplitError(f"{name} has no counterpart in the split model; it was made from another model.")
            start = f"{owner}." if owner else ""
            found[name] = {}
            for mask in rec.param_groups:
                label = rec.family.label(mask)
                copy = cast(nn.Parameter, copies(module)[label]._parameters[key])
                found[name][f"{start}{COPIES}.{label}.{key}"] = copy
        shape = next(iter(found[name].values())).shape
        if shape != p.shape:
            raise SplitError(f"{name} is {tuple(p.shape)} in the model and {tuple(shape)} in the split model.")
    return found
