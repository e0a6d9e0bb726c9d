"""One task's view of a model: an ordinary module tree that shares every tensor."""

from collections.abc import Mapping

from torch import nn

from reconmtl.errors import SplitError, nearest
from reconmtl.splitting.outputs import get_task, task_keys
from reconmtl.splitting.ownership import plain_copy
from reconmtl.splitting.storage import record
from reconmtl.splitting.structure import Value


class View(nn.Module):
    """A model restricted to one task; made by `view`.

    Attributes:
        module: The user's structure, in its original classes and with its original state-dict keys.
        task: Name of the task.
        tasks: Names of all tasks; empty for the view of an unsplit model.
    """

    def __init__(self, module: nn.Module, task: str, tasks: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.module = module
        self.task = task
        self.tasks = tasks

    def forward(self, *args: Value, **kwargs: Value) -> Value:
        """Call the module; returns {task: output}, or what a trunk alone returns."""
        out = self.module(*args, **kwargs)
        names = task_keys(out)
        if self.task in names:
            return {self.task: get_task(out, self.task)}
        if names and isinstance(out, Mapping) and (not self.tasks or any(t in names for t in self.tasks)):
            raise SplitError(
                f"The forward returned no output for task {self.task!r}. {nearest(self.task, map(str, names))}"
            )
        return out


def view(model: nn.Module, task: str) -> View:
    """Restrict a model to one task, sharing every tensor with it.

    A view trains, exports and compiles like the original network. Make it anew after `model.to(...)`, which replaces
    buffers, and after a call in another mode that gives further layers their own statistics. A view runs the user's
    whole forward: where that calls one normalisation for one task after the other (attention on shared blocks), all of
    these calls update the view's statistics, as in the unsplit model.

    Args:
        model: A split model, or any model whose forward returns a mapping (or fields) by task.
        task: Name of the task.

    Returns:
        A module whose forward takes what the model takes and returns {task: output}; for a trunk alone, what the
        trunk returns. Its `.module` is the user's structure.

    Raises:
        SplitError: If the split model has no such task (for an unsplit model, at the first call).

    Example:
        >>> from reconmtl.plan import Plan
        >>> from reconmtl.splitting import split
        >>> net = split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), Plan(tasks=["a", "b"], layers=["1"]))
        >>> view(net, "b").module[1].weight is net[1].per_task["b"].weight
        True
    """
    rec = record(model)
    if rec is None:
        return View(plain_copy(model, 0, share_buffers=True), task).train(model.training)
    tasks = rec.family.tasks
    if task not in tasks:
        raise SplitError(f"This split model has no task {task!r}. {nearest(task, tasks)}")
    wrapper = View(plain_copy(model, rec.family.mask([task]), share_buffers=True), task, tasks)
    wrapper.training = model.training  # each module below keeps its own mode
    return wrapper
