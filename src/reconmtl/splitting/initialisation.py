"""`init="fresh"`: every copy drawn anew by its module's own reset."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from reconmtl.errors import SplitError
from reconmtl.layers import ROOT
from reconmtl.splitting.storage import copies, record

RESETS = ("reset_parameters", "_reset_parameters")


def fresh(new: nn.Module, model: nn.Module, layers: Sequence[str]) -> None:
    """Reset every copy of the named layers.

    Args:
        new: The split model.
        model: The model that it was made from.
        layers: Names of the split layers.

    Raises:
        SplitError: If a module has no reset of its own.
    """
    for name in layers:
        path = name if name != ROOT else ""
        split, original = new.get_submodule(path), model.get_submodule(path)
        rec = record(split)
        if rec is None or not rec.params:
            continue
        reset = next((r for r in RESETS if callable(getattr(original, r, None))), None)
        if reset is None:
            raise SplitError(
                f"{name} ({type(original).__name__}) has no reset_parameters() to draw fresh copies with. Give its "
                "class one, or use init='copy'."
            )
        for mask in rec.param_groups:
            twin = copy.deepcopy(original)
            getattr(twin, reset)()
            child = copies(split)[rec.family.label(mask)]
            with torch.no_grad():
                for key, p in child.named_parameters(recurse=False):
                    p.copy_(twin._parameters[key])  # type: ignore[arg-type]
                for key, b in child.named_buffers(recurse=False):
                    b.copy_(twin._buffers[key])  # type: ignore[arg-type]
