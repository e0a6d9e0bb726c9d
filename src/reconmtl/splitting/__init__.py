"""Split any layer of any PyTorch model into per-task copies, without rewriting the model."""

from reconmtl.splitting.costs import Cost, cost
from reconmtl.splitting.optimizers import check_optimizer, split_optimizer
from reconmtl.splitting.splitter import split
from reconmtl.splitting.states import load_shared, saved_plan
from reconmtl.splitting.verifying import Verified, verify
from reconmtl.splitting.views import View, view

__all__ = [
    "Cost",
    "Verified",
    "View",
    "check_optimizer",
    "cost",
    "load_shared",
    "saved_plan",
    "split",
    "split_optimizer",
    "verify",
    "view",
]
