import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import ProbeError
from reconmtl.probing import Probe

torchjd = pytest.importorskip("torchjd.autojac")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in "abc"})

    def features(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return z

    def losses(self, z: Tensor) -> dict[str, Tensor]:
        return {t: (head(z) - i).pow(2).mean() for i, (t, head) in enumerate(self.heads.items())}


@pytest.mark.parametrize("through", ["backward", "mtl_backward"])
def test_what_torchjd_has_taken_gives_the_grams_of_a_probe(through: str) -> None:
    torch.manual_seed(0)
    model = Small().double()
    probe, other, strided = Probe(model), Probe(model), Probe(model, every=2)
    for _ in range(3):
        x = torch.randn(16, 5, dtype=torch.float64)
        probe.backward(model.losses(model.features(x)))
        model.zero_grad()
        z = model.features(x)
        losses = model.losses(z)
        with pytest.raises(ProbeError, match=r"6 of 6 shared parameters have no `.jac` field: 'first.weight'"):
            other.record_jac(losses)
        if through == "backward":
            torchjd.backward(list(losses.values()))
        else:
            torchjd.mtl_backward(list(losses.values()), features=z)
        with pytest.raises(ProbeError, match=r"'first.weight' has \[3, 8, 5\], expected \[2, 8, 5\]"):
            other.record_jac({t: losses[t] for t in "ab"})
        other.record_jac(losses)
        strided.record_jac(losses)
        for p in model.parameters():
            vars(p).pop("jac", None)
    log = other.log
    assert (log.tasks, log.layers, log.sizes) == (probe.log.tasks, probe.log.layers, probe.log.sizes)
    torch.testing.assert_close(log.grams, probe.log.grams, rtol=1e-10, atol=1e-14)
    assert strided.log.steps == 2


def test_micro_batches_are_summed_already() -> None:
    torch.manual_seed(0)
    model = Small().double()
    whole, parts = Probe(model), Probe(model)
    x = torch.randn(16, 5, dtype=torch.float64)
    whole.backward(model.losses(model.features(x)))
    for part in x.split(8):
        losses = {t: v / 2 for t, v in model.losses(model.features(part)).items()}
        torchjd.backward(list(losses.values()))
    parts.record_jac(losses)
    torch.testing.assert_close(parts.log.grams, whole.log.grams, rtol=1e-10, atol=1e-14)


def test_a_layer_of_some_tasks_is_nan_for_the_others() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, second)
    x = torch.randn(4, 3)
    z = first(x)
    losses = {"a": second(z).sum(), "b": second(z).pow(2).sum(), "c": z.pow(2).sum()}
    torchjd.backward(list(losses.values()))
    probe = Probe(model)
    probe.record_jac(losses)
    assert probe.log.cosines()[0].isfinite().tolist() == [[True, True, True], [True, False, False]]
