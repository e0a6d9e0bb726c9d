"""Watch a Lightning training with manual optimisation: a callback that holds the probe.

Import it after Lightning itself: it fits `lightning.pytorch` and `pytorch_lightning`, whichever is in use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reconmtl.errors import ProbeError, UnknownNameError, missing_extra, nearest
from reconmtl.probing import Engine, Probe

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _base() -> Any:  # noqa: ANN401 two packages define this class
    """The callback class of the Lightning that is in use: the one imported already, else the one that is installed."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ModuleNotFoundError:
            continue
    raise missing_extra("Probing a Lightning training", "lightning")


class ProbeCallback(_base()):  # type: ignore[misc]  # its base is known at run time only
    """Holds a `Probe` for the time of a Lightning training with manual optimisation.

    In `training_step`, call `callback.backward(losses)` instead of `self.manual_backward(...)`; Lightning's hooks for
    the latter are not called. With precision "16-mixed" Lightning's gradient scaler is followed. After
    `trainer.fit`, `callback.probe.log` holds what was recorded, and is written to `out`.

    Args:
        module: Name of the submodule of the LightningModule that is watched, whose layer names the log then has; None
            watches all of it.
        out: Folder to write the log to when the training ends.
        engine: See `Probe`, as for all that follow.
        every: Measure one step of so many.
        start: First step that may be measured, counted from 0.
        stop: First step that is not measured any more; None never stops.
        overhead: Instead of `every`: the share of training time that measuring may add.
        exact: Add one ordinary backward pass per measured step, so that `.grad` is bit-equal to plain training's.
        shared: Names or globs of shared layers, only needed where compiled regions hide the graph.

    Raises:
        ProbeError: When the training starts: if optimisation is automatic, or several processes train by other means
            than DDP.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        out: str | Path | None = None,
        engine: Engine = "auto",
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        overhead: float | None = None,
        exact: bool = False,
        shared: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.out = out
        self._options: dict[str, Any] = {
            "engine": engine,
            "every": every,
            "start": start,
            "stop": stop,
            "overhead": overhead,
            "exact": exact,
            "shared": None if shared is None else list(shared),
        }
        self._probe: Probe | None = None
        self._scaler: Any = None
        self._state: dict[str, Any] = {}  # of a checkpoint, until there is a probe

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401 of either package
        """Make the probe, when the model is on its device."""
        if pl_module.automatic_optimization:
            raise ProbeError(
                "With automatic optimisation Lightning sees one loss, not one per task: set "
                "`self.automatic_optimization = False` and call `callback.backward(losses)` in `training_step`."
            )
        group: Any = False
        if trainer.world_size > 1:
            kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
            if "DDPStrategy" not in kinds:
                raise ProbeError(
                    f"This training runs in {trainer.world_size} processes by {kinds[0]}, where a probe would see "
                    'local gradients only: probe with `Trainer(strategy="ddp")` or `Trainer(devices=1)`.'
                )
            # Under manual optimisation Lightning averages in `manual_backward` only, so the probe averages all steps.
            group = torch.distributed.group.WORLD
        model = pl_module
        if self.module is not None:
            names = [name for name, _ in pl_module.named_modules() if name]
            if self.module not in names:
                raise UnknownNameError(f"There is no submodule {self.module!r}. {nearest(self.module, names)}")
            model = pl_module.get_submodule(self.module)
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._probe = Probe(model, group=group, **self._options)
        if self._state:
            self._probe.load_state_dict(self._state)
            self._state = {}

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002 of either package
        """Write the log, in one process."""
        if self.out is not None and trainer.is_global_zero:
            self.probe.log.save(self.out)

    def state_dict(self) -> dict[str, Any]:
        """What goes into Lightning's checkpoints, so that a training that is resumed goes on with its log."""
        return {} if self._probe is None else self._probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, when the training starts."""
        self._state = state_dict

    def backward(self, losses: Mapping[str, Tensor], *, last: bool = True) -> None:
        """Do what `Probe.backward` does; to be called in `training_step`.

        Args:
            losses: Scalar loss per task, from one forward pass.
            last: False if more micro-batches of the same step follow.

        Raises:
            ProbeError: Before the training has started, and as `Probe.backward`.
        """
        self.probe.backward(losses, scaler=self._scaler, last=last)

    @property
    def probe(self) -> Probe:
        """The probe of the training that runs, or ran last; `log` is the name of Lightning's own function here."""
        if self._probe is None:
            raise ProbeError(
                "No training has started: pass this callback to `Trainer(callbacks=[...])` and call `fit`."
            )
        return self._probe
