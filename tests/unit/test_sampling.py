import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reconmtl.batches import ALL
from reconmtl.errors import RunError
from reconmtl.sampling import Sampler

sizes = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 30), min_size=1) | st.builds(
    lambda n: {ALL: n}, st.integers(1, 30)
)


def _lists(sampler: Sampler) -> list[dict[str, list[int]]]:
    return [{k: v.tolist() for k, v in batch.items()} for batch in sampler.epoch()]


@given(sizes, st.integers(1, 12), st.booleans(), st.integers(0, 5))
def test_an_epoch_is_the_longest_set_and_shorter_ones_cycle(
    sizes: dict[str, int], batch: int, drop_last: bool, seed: int
) -> None:
    sampler = Sampler(sizes, batch_size=batch, drop_last=drop_last, seed=seed)
    longest = max(sizes.values())
    for _ in range(2):
        epoch = _lists(sampler)
        assert len(epoch) == sampler.steps == (longest // batch if drop_last else -(-longest // batch))
        for key, size in sizes.items():
            drawn = [i for b in epoch for i in b[key]]
            assert len(drawn) == (longest // batch * batch if drop_last else longest)
            assert all(len(b[key]) == batch for b in epoch[: longest // batch])
            for start in range(0, len(drawn) - size + 1, size):  # every round is a permutation
                assert sorted(drawn[start : start + size]) == list(range(size))
            assert len(set(drawn)) == min(size, len(drawn))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_one_shared_set_comes_in_the_order_of_the_seeds_permutations(n: int, batch: int, seed: int) -> None:
    sampler = Sampler({ALL: n}, batch_size=batch, drop_last=False, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(2):
        assert [i for b in _lists(sampler) for i in b[ALL]] == torch.randperm(n, generator=draw).tolist()


@given(sizes, st.integers(1, 5), st.integers(0, 60), st.integers(0, 5))
def test_a_restored_sampler_goes_on(sizes: dict[str, int], batch: int, stop: int, seed: int) -> None:
    whole = Sampler(sizes, batch_size=batch, drop_last=False, seed=seed)
    expected = [b for _ in range(3) for b in _lists(whole)]
    first = Sampler(sizes, batch_size=batch, drop_last=False, seed=seed)
    got: list[dict[str, list[int]]] = []
    stop = min(stop, len(expected) - 1)
    while len(got) < stop:
        for b in first.epoch():
            got.append({k: v.tolist() for k, v in b.items()})
            if len(got) == stop:
                break
    second = Sampler(sizes, batch_size=batch, drop_last=False, seed=seed + 1)
    second.restore(first.state())
    while len(got) < len(expected):
        got += _lists(second)
    assert got == expected


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 5))
def test_processes_share_the_batches_of_one(
    sizes: dict[str, int], batch: int, world: int, drop_last: bool, seed: int
) -> None:
    alone = Sampler(sizes, batch_size=batch * world, drop_last=drop_last, seed=seed)
    ranks = [
        Sampler(sizes, batch_size=batch, drop_last=drop_last, seed=seed, rank=r, world=world) for r in range(world)
    ]
    for whole, *parts in zip(_lists(alone), *map(_lists, ranks), strict=True):
        assert whole == {k: [i for part in parts for i in part[k]] for k in sizes}


def test_a_tasks_own_data_come_in_the_same_order_with_and_without_the_others() -> None:
    both = _lists(Sampler({"a": 12, "b": 12}, batch_size=3, drop_last=True, seed=1))
    alone = _lists(Sampler({"a": 12}, batch_size=3, drop_last=True, seed=1))
    assert [b["a"] for b in both] == [b["a"] for b in alone]
    assert [b["a"] for b in both] != [b["b"] for b in both]


@pytest.mark.parametrize(
    "state", [None, {}, {"start": {}, "step": 0}, {"start": {ALL: 3}, "step": 0}, {"start": {ALL: None}, "step": 99}]
)
def test_a_damaged_place_is_refused(state: object) -> None:
    with pytest.raises(RunError, match="its place among the batches"):
        Sampler({ALL: 8}, batch_size=2, drop_last=True, seed=0).restore(state)


def test_fewer_steps_when_asked() -> None:
    sampler = Sampler({ALL: 100}, batch_size=10, drop_last=True, seed=0, most=2)
    assert [len(b[ALL]) for b in sampler.epoch()] == [10, 10]
