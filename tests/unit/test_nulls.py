"""Conflicts beyond chance: the null against sampling, no bias to small layers, planted conflicts found."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from reconmtl.conflicts import ConflictLog
from reconmtl.errors import RunError, SeverityError
from reconmtl.nulls import chance_below, excess


def make_log(gradients: list[torch.Tensor]) -> ConflictLog:
    """Gradients per layer, [steps, tasks, size]."""
    tasks = gradients[0].shape[1]
    rows, columns = torch.triu_indices(tasks, tasks)
    grams = torch.stack([(g @ g.transpose(1, 2))[:, rows, columns] for g in gradients], 1)
    names = [f"layer{i}" for i in range(len(gradients))]
    return ConflictLog(
        grams,
        tasks=[f"t{i}" for i in range(tasks)],
        layers=names,
        sizes={n: g.shape[2] for n, g in zip(names, gradients, strict=True)},
        types=dict.fromkeys(names, "Linear"),
    )


@pytest.mark.parametrize("severity", [-0.5, -0.1, -0.02, 0.0])
def test_the_null_is_the_distribution_of_angles_of_random_directions(severity: float) -> None:
    d = np.array([2.0, 2.5, 3.0, 5.7, 16.0, 128.0, 5000.0])
    expected = beta.cdf((1 + severity) / 2, (d - 1) / 2, (d - 1) / 2)
    np.testing.assert_allclose(chance_below(d, severity), expected, atol=2e-4)
    assert (chance_below([0.1, np.inf], severity) >= 0).all()


def test_unrelated_gradients_have_no_excess_whatever_the_size_though_their_scores_follow_it() -> None:
    torch.manual_seed(0)
    sizes = [4, 16, 64, 256, 1024]
    log = make_log([torch.randn(600, 2, n) for n in sizes])
    scores = log.scores(severity=-0.1).tolist()
    assert scores == sorted(scores, reverse=True) and scores[0] > 10 * (scores[-1] + 1)
    found = excess(log, severity=-0.1)
    assert np.abs(found.excess).max() < 0.04
    np.testing.assert_allclose(found.dimensions, sizes, rtol=0.2)
    assert (found.p > 0.01).all()


def test_a_large_layer_in_conflict_comes_before_a_small_one_by_chance() -> None:
    torch.manual_seed(1)
    shared = torch.randn(400, 1, 500)
    fighting = torch.cat([shared, -0.4 * shared + torch.randn(400, 1, 500)], 1)  # cosines about -0.37
    agreeing = torch.cat([shared, 0.2 * shared + torch.randn(400, 1, 500)], 1)
    noise = torch.randn(400, 2, 4)
    log = make_log([noise, fighting, agreeing])
    found = excess(log, severity=-0.1)
    assert found.order[0] == "layer1"
    assert found.p[1] < 0.01 < found.p[0]
    assert found.p[2] > 0.5
    assert found.shares[1] == pytest.approx(log.scores(severity=-0.1)[1] / log.steps)


def test_the_p_of_chance_is_spread_out_and_correlated_steps_do_not_make_it_small() -> None:
    torch.manual_seed(2)
    small = {1: 0, 20: 0}
    for _ in range(60):
        noise = torch.randn(200, 2, 12)
        for t in range(1, 200):  # neighbours alike, as in a training
            noise[t] = 0.8 * noise[t - 1] + 0.6 * noise[t]
        log = make_log([noise])
        for block in small:
            small[block] += int(excess(log, severity=-0.1, block=block, samples=200).p[0] < 0.05)
    assert small[20] <= 12
    assert small[20] <= small[1]


def test_layers_without_measurements_and_empty_logs() -> None:
    log = make_log([torch.randn(50, 2, 4), torch.zeros(50, 2, 4)])
    found = excess(log, severity=-0.1)
    assert np.isnan(found.p[1]) and found.order[-1] == "layer1"
    with pytest.raises(RunError, match="empty"):
        excess(log.window(0, 0), severity=-0.1)
    with pytest.raises(SeverityError):
        excess(log, severity=0.1)


def with_null(gradients: list[torch.Tensor], noise: list[torch.Tensor]) -> ConflictLog:
    return make_log(gradients).with_null(make_log(noise))


def test_a_steady_conflict_does_not_widen_the_sampled_null_as_it_does_the_analytic_one() -> None:
    torch.manual_seed(3)
    sizes = [6, 60]
    meaning = [torch.stack([torch.ones(n), -torch.ones(n)])[None] for n in sizes]  # fixed directions, opposed
    noise = [2 * torch.randn(600, 2, n) for n in sizes]
    log = with_null([m + x for m, x in zip(meaning, noise, strict=True)], [torch.randn(600, 2, n) for n in sizes])
    sampled, analytic = (excess(log, severity=-0.1, null=n) for n in ("sampled", "analytic"))
    truth = chance_below(sizes, -0.1)
    np.testing.assert_allclose(sampled.chance, truth, atol=0.03)
    assert analytic.chance[1] > truth[1] + 0.05
    assert (sampled.excess > analytic.excess).all() and (sampled.p < 0.01).all()
    np.testing.assert_allclose(sampled.dimensions, sizes, rtol=0.2)
    assert excess(log, severity=-0.1).null == "sampled" and excess(make_log(noise), severity=-0.1).null == "analytic"


def test_the_sampled_null_counts_either_sign_alike_and_unrelated_gradients_have_no_excess() -> None:
    torch.manual_seed(4)
    sizes = [4, 16, 256]
    together = [torch.randn(500, 1, n) for n in sizes]  # noise of the same images: cosines above zero
    log = with_null([torch.randn(500, 2, n) for n in sizes], [torch.randn(500, 2, n) for n in sizes])
    found = excess(log, severity=-0.1)
    assert np.abs(found.excess).max() < 0.06 and (found.p > 0.005).all()
    common = [torch.randn(500, 2, n) + 0.5 * c for n, c in zip(sizes, together, strict=True)]
    wider = excess(log.with_null(make_log(common)), severity=-0.1)
    assert (wider.chance >= found.chance - 0.03).all()
    cosines = make_log(common).cosines()
    share = ((cosines < -0.1).double() + (-cosines < -0.1).double()).mean((0, 2)) / 2
    np.testing.assert_allclose(wider.chance, share.numpy())


def test_a_null_that_is_not_there_is_refused() -> None:
    log = make_log([torch.randn(20, 2, 4)])
    with pytest.raises(RunError, match="null=True"):
        excess(log, severity=-0.1, null="sampled")
    with pytest.raises(RunError, match="analytic"):
        excess(log, severity=-0.1, null="analytical")  # type: ignore[arg-type]


def test_a_long_recording_is_drawn_from_as_many_starts_as_a_shorter_one() -> None:
    torch.manual_seed(5)
    log = make_log([torch.randn(20000, 2, 8)])
    found = excess(log, severity=-0.1, samples=50)
    assert abs(float(found.excess[0])) < 0.02 and found.p[0] > 0.01
