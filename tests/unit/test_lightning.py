"""The callback, under both names of Lightning, against a plain loop."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from reconmtl.errors import ProbeError, UnknownNameError

TRAINING = """
import sys
import torch
from importlib import import_module
from torch import nn
package, precision = import_module(sys.argv[1]), import_module(f"{sys.argv[1]}.plugins.precision")
from reconmtl.conflicts import ConflictLog
from reconmtl.lightning import ProbeCallback
from reconmtl.probing import Probe

assert issubclass(ProbeCallback, package.Callback)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def losses(self, x):
        y = self.second(torch.tanh(self.first(x))).float()
        return {"a": (y[:, 0] - 1).pow(2).mean(), "b": (y[:, 1] - y[:, 0]).pow(2).mean()}

class Training(package.LightningModule):
    def __init__(self, callback):
        super().__init__()
        self.automatic_optimization = False
        self.callback = callback
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for i, part in enumerate(batch.chunk(2)):
            self.callback.backward({t: v / 2 for t, v in self.net.losses(part).items()}, last=i == 1)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
for plugins in ([], [precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)]):
    for epochs, resumed in ([2, None],) if plugins else ([1, None], [2, "half.ckpt"]):
        callback = ProbeCallback(module="net", out="log", engine="flat")
        training = Training(callback)
        trainer = package.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[callback], plugins=plugins, logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )
        trainer.fit(training, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=resumed)
        trainer.save_checkpoint("half.ckpt")
    log = ConflictLog.load("log")
    assert torch.equal(log.grams, callback.probe.log.grams)
    if plugins:  # the first step overflows in half precision, and Lightning's own scaler skips it
        assert callback.probe.skipped == 1 and log.steps == 5, (callback.probe.skipped, log.steps)
        assert scaler.get_scale() == 2.0**10
        continue
    torch.manual_seed(0)
    net = Net()
    probe, optimizer = Probe(net), torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        for batch in data.split(8):
            optimizer.zero_grad()
            probe.backward(net.losses(batch))
            optimizer.step()
    assert log.layers == ("first", "second")
    torch.testing.assert_close(log.grams, probe.log.grams, rtol=1e-4, atol=1e-7)
    for p, q in zip(net.parameters(), training.net.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_lightning_training_gives_the_log_of_a_plain_loop(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package.partition(".")[0])
    subprocess.run([sys.executable, "-c", TRAINING, package], check=True, timeout=200, cwd=tmp_path)


class Net(nn.Module):
    def __init__(self, *, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.net = nn.Linear(2, 2)


@pytest.mark.slow
def test_what_cannot_be_probed_is_refused_before_training() -> None:
    pytest.importorskip("lightning")
    from reconmtl.lightning import ProbeCallback

    def start(world_size: int, net: nn.Module, **options: Any) -> None:
        plain = SimpleNamespace()
        trainer = SimpleNamespace(world_size=world_size, precision_plugin=plain, strategy=plain)
        ProbeCallback(**options).on_fit_start(trainer, net)

    start(1, Net(automatic=False), module="net")
    with pytest.raises(ProbeError, match="automatic_optimization = False"):
        start(1, Net(automatic=True))
    with pytest.raises(ProbeError, match="4 processes by SimpleNamespace"):
        start(4, Net(automatic=False))
    with pytest.raises(UnknownNameError, match="Nearest: 'net'"):
        start(1, Net(automatic=False), module="nets")
    with pytest.raises(ProbeError, match="No training has started"):
        ProbeCallback().backward({})


def test_without_lightning_the_line_that_installs_it_is_shown() -> None:
    code = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
from reconmtl.errors import MissingExtraError
try:
    import reconmtl.lightning
except MissingExtraError as error:
    assert 'pip install "reconmtl[lightning]"' in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
