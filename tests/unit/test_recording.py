import torch
from torch import Tensor, nn

from reconmtl.gram import Gradients
from reconmtl.recording import Recorder


class Two(nn.Module):
    """Three tasks; `late` is only used when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, late: bool) -> Tensor:
        x = torch.tanh(self.late(x)) if late else x
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def test_a_log_beyond_the_bound_counts_what_a_log_within_it_keeps() -> None:
    torch.manual_seed(0)
    model = Two()
    gradients = Gradients(model)
    kept, bounded, early = (Recorder(gradients.layers, limit=b) for b in (float("inf"), 4000, 0))
    for step in range(150):
        out = model(torch.randn(3, 4), late=step >= 100)
        losses = {"b": out[:, 0].mean(), "a": out[:, 1].pow(2).sum(), "c": out.sin().sum()}
        if step < 70:
            del losses["a"]  # a task that appears later, and pairs with it
        found = gradients.sweep(losses)
        for recorder in (kept, bounded, early):
            recorder.add(found.layout, found.gram)
    log = kept.log(every=1)
    assert log.counts is None
    assert log.tasks == ("b", "c", "a")
    assert log.layers == ("late", "first", "second")
    for recorder in (bounded, early):
        counted = recorder.log(every=1)
        assert counted.counts is not None
        assert counted.steps == 150
        assert (counted.tasks, counted.layers, counted.sizes) == (log.tasks, log.layers, log.sizes)
        for s in (0.0, -0.001, -0.333, -0.9):
            assert torch.equal(counted.scores(severity=s), log.scores(severity=s))
        assert torch.equal(counted.pair_scores(severity=-0.5), log.pair_scores(severity=-0.5))
