import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from logs import make_log, two_task_grams
from reconmtl.conflicts import ConflictLog, conflict_scores, cosines_from_grams, distribution, share_below
from reconmtl.errors import RunError, SeverityError


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_cosines_are_those_of_the_gradients(tasks: int, size: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.randn(3, tasks, size, generator=draw, dtype=torch.float64)
    full = gradients @ gradients.transpose(1, 2)
    rows, columns = torch.triu_indices(tasks, tasks)
    measured = cosines_from_grams(full[:, rows, columns], tasks)
    pair = 0
    for i in range(tasks):
        for j in range(i + 1, tasks):
            expected = torch.cosine_similarity(gradients[:, i], gradients[:, j], dim=1)
            torch.testing.assert_close(measured[:, pair], expected, rtol=1e-10, atol=1e-12)
            pair += 1
    assert pair == measured.shape[1]


def test_tiny_and_huge_gradients_have_cosines_too() -> None:
    grams = torch.tensor([[1e-36, -1e-36, 1e-36], [1e36, 5e35, 1e36]])
    torch.testing.assert_close(cosines_from_grams(grams, 2), torch.tensor([[-1.0], [0.5]]))


def test_a_zero_or_absent_gradient_gives_nan_and_no_conflict() -> None:
    grams = torch.tensor([[[0.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, math.nan]]])
    log = make_log(grams)
    assert log.cosines().isnan().flatten().tolist() == [True, False, True]
    assert log.scores(severity=0.0).tolist() == [0, 1, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, -0.1, -0.25, -0.5]))
def test_scores_equal_a_hand_written_count(seed: int, severity: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    # multiples of 1/4 hit the thresholds 0, -0.25 and -0.5 exactly
    cosines = torch.randint(-4, 5, (6, 3, 3), generator=draw) / 4
    expected = oracles.count_conflicts(cosines.tolist(), severity)
    assert conflict_scores(cosines, severity=severity).tolist() == expected


def test_a_threshold_that_is_hit_exactly_is_not_counted() -> None:
    grams = two_task_grams([[-0.1, -0.1000001, -0.09], [-0.1, 0.3, -0.2]])
    assert make_log(grams).scores(severity=-0.1).tolist() == [0, 1, 1]


@pytest.mark.parametrize("severity", [0.1, -1.0, -2.0, math.nan, "x", True])
def test_severity_outside_its_range_is_refused(severity: float) -> None:
    with pytest.raises(SeverityError, match=r"outside \(-1, 0\]"):
        conflict_scores(torch.zeros(1, 1, 1), severity=severity)


def test_whole_vector_cosines_are_those_of_the_concatenation() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5, 2, size, dtype=torch.float64) for size in (3, 8, 1)]
    rows, columns = torch.triu_indices(2, 2)
    log = make_log(torch.stack([(g @ g.transpose(1, 2))[:, rows, columns] for g in gradients], dim=1))
    joined = torch.cat(gradients, dim=2)
    expected = torch.cosine_similarity(joined[:, 0], joined[:, 1], dim=1)
    torch.testing.assert_close(log.whole()[:, 0], expected, rtol=1e-10, atol=0)


def test_whole_vector_leaves_out_layers_that_a_pair_does_not_share() -> None:
    grams = torch.tensor([[[1.0, -1.0, 1.0], [4.0, math.nan, math.nan]], [[math.nan] * 3, [math.nan] * 3]])
    whole = make_log(grams).whole()
    assert whole[0, 0] == pytest.approx(-1 / math.sqrt(5))
    assert whole[1, 0].isnan()


def test_distribution_counts_every_cosine_once_and_edges_in_the_upper_bin() -> None:
    cosines = torch.tensor([0.5, 0.0, -0.005, -0.01, -0.02, -0.0200001, -0.5, math.nan])
    shares = distribution(cosines, edges=(0.0, -0.01, -0.02)) * 7
    assert shares.tolist() == pytest.approx([2, 2, 1, 2])
    assert share_below(cosines, -0.01) == pytest.approx(3 / 7)
    assert math.isnan(share_below(torch.tensor([math.nan]), 0.0))


def test_noise_marks_layers_without_signal() -> None:
    grams = torch.ones(4, 3, 3)
    grams[:, 1] *= 1e-13
    grams[:, 2] *= 1e-11
    assert make_log(grams).noise().tolist() == [False, True, False]


def test_merge_and_window_are_concatenation_and_slice() -> None:
    first, second = make_log(two_task_grams([[0.1], [0.2]])), make_log(two_task_grams([[-0.3]]))
    merged = first.merge([second])
    assert merged.steps == 3
    torch.testing.assert_close(merged.window(2, 3).cosines(), second.cosines())
    with pytest.raises(RunError, match="same tasks and layers"):
        first.merge([make_log(two_task_grams([[0.1, 0.2]]))])


def test_a_log_loads_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grams = torch.randn(7, 4, 6)
    grams[2, 1] = math.nan
    log = make_log(grams, tasks=("a", "b", "c"))
    log.save(tmp_path / "log")
    again = ConflictLog.load(tmp_path / "log")
    assert torch.equal(again.grams.nan_to_num(9.0), log.grams.nan_to_num(9.0))
    assert (again.tasks, again.layers, again.sizes, again.types, again.every) == (
        log.tasks,
        log.layers,
        log.sizes,
        log.types,
        log.every,
    )
    assert again.pairs == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(format="other"), "'format'"),
        (lambda d: d.update(tasks="ab"), "'tasks'"),
        (lambda d: d["layers"].append({"name": 3}), "'layers'"),
        (lambda d: d["layers"].pop(), "do not belong together"),
        (lambda d: d.update(every=0), "'every'"),
        (lambda d: d.update(steps=10**12), "expected"),
    ],
)
def test_damage_to_a_log_is_named(tmp_path: Path, damage: "object", message: str) -> None:
    assert callable(damage)
    make_log(two_task_grams([[0.1, 0.2]])).save(tmp_path)
    content = json.loads((tmp_path / "log.json").read_text())
    damage(content)
    (tmp_path / "log.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=message):
        ConflictLog.load(tmp_path)


def test_truncated_grams_are_named(tmp_path: Path) -> None:
    make_log(two_task_grams([[0.1, 0.2]])).save(tmp_path)
    file = tmp_path / "grams.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"grams\.safetensors cannot be read"):
        ConflictLog.load(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match="There is no file"):
        ConflictLog.load(tmp_path)


def test_a_null_is_kept_by_windows_merges_and_files_and_has_a_format_of_its_own(tmp_path: Path) -> None:
    first, second = make_log(two_task_grams([[0.1], [0.2], [-0.4]])), make_log(two_task_grams([[0.5], [-0.6], [0.7]]))
    log = first.with_null(second)
    assert first.null is None and log.null is second
    part = log.window(1, 3).null
    assert part is not None and torch.equal(part.grams, second.grams[1:3])
    assert first.with_null(second.window(0, 2)).window(0, 1).null is None  # whose steps these are is not known
    twice = log.merge([log]).null
    assert twice is not None and twice.steps == 6 and log.merge([first]).null is None
    first.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "log.json").read_text())["format"] == "reconmtl.log/1"
    for name, saved in (("grams", log), ("counts", log.counted())):
        saved.save(tmp_path / name)
        assert json.loads((tmp_path / name / "log.json").read_text())["format"] == "reconmtl.log/2"
        again = ConflictLog.load(tmp_path / name)
        assert again.null is not None
        assert torch.equal(again.null.scores(severity=-0.1), second.scores(severity=-0.1))
    content = json.loads((tmp_path / "grams" / "log.json").read_text())
    del content["null"]
    (tmp_path / "grams" / "log.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="'null'"):
        ConflictLog.load(tmp_path / "grams")
    (tmp_path / "counts" / "null-counts.safetensors").unlink()
    with pytest.raises(RunError, match="null-counts"):
        ConflictLog.load(tmp_path / "counts")
    with pytest.raises(RunError, match="same tasks"):
        first.with_null(make_log(two_task_grams([[0.1, 0.2]])))
