"""Batches of any structure, with targets that may be missing, against one sample at a time."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reconmtl.batches import call, check_outputs, fetch, move, select
from reconmtl.errors import ProblemError

TASKS = ("a", "b")
CPU = torch.device("cpu")


class Pair(NamedTuple):
    box: Tensor
    label: Tensor


class Items:
    """A list as a data set."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@given(present=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_targets_that_are_there_are_stacked_with_their_positions(present: list[tuple[bool, bool, bool]]) -> None:
    items = []
    for i, (a, b, absent) in enumerate(present):
        targets = {t: torch.tensor(10 * i + k) for k, t in enumerate(TASKS) if (a, b)[k]}
        items.append((torch.full((2,), float(i)), targets if absent else {"a": None, "b": None} | targets))
    inputs, found = fetch(Items(items), torch.arange(len(items)), TASKS)
    assert torch.equal(inputs, torch.stack([x for x, _ in items]))
    for k, task in enumerate(TASKS):
        positions = [i for i, flags in enumerate(present) if flags[k]]
        if not positions:
            assert task not in found
            continue
        values, at = found[task]
        assert values.tolist() == [10 * i + k for i in positions]
        assert (list(range(len(items))) if at is None else at.tolist()) == positions
        assert (at is None) == (len(positions) == len(items))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (lambda i: torch.tensor([i, i]), 6),
        (lambda i: (torch.tensor([i]), torch.tensor([i])), 6),
        (lambda i: {"x": torch.tensor([i]), "y": torch.tensor([i])}, 6),
        (lambda i: Pair(torch.tensor([i]), torch.tensor([i])), 6),
    ],
    ids=["tensor", "tuple", "dict", "named tuple"],
)
def test_a_model_gets_its_input_as_it_asks_for_it(one: Any, expected: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x.sum() if y is None else x.sum() + y.sum()

    inputs, _ = fetch(Items([(one(i), {"a": 0}) for i in range(3)]), torch.tensor([2, 1]), TASKS)
    assert int(call(Net(), move(inputs, CPU))) == expected


def test_an_own_collate_gives_whole_targets_or_none() -> None:
    boxes, labels = torch.rand(3, 4), torch.tensor([2, 0, 1])  # a pair that must not be taken for (values, positions)

    def collate(items: list[str]) -> tuple[list[str], dict[str, Any]]:
        return items, {"a": (boxes, labels), "b": None, "unknown": 1}

    inputs, targets = fetch(Items(["x", "y", "z"]), torch.arange(3), TASKS, collate)
    assert inputs == ["x", "y", "z"] and list(targets) == ["a"]
    values, at = targets["a"]
    assert values[0] is boxes and values[1] is labels and at is None


def test_a_data_set_that_makes_batches_is_asked_for_them_unless_collate_is_given() -> None:
    class Fast(Items):
        def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return indices * 1.0, {"b": indices * 2, "a": indices}

    data = Fast([(torch.tensor(7.0), {"a": 7})] * 3)
    inputs, targets = fetch(data, torch.tensor([2, 0]), TASKS)
    assert inputs.tolist() == [2, 0]
    assert [(t, v.tolist(), at) for t, (v, at) in targets.items()] == [("a", [2, 0], None), ("b", [4, 0], None)]
    assert fetch(data, torch.tensor([2]), TASKS, lambda items: (len(items), {}))[0] == 1

    class Sized(Items):
        batch = 32  # only an attribute of that name

    assert fetch(Sized([(torch.tensor(7.0), {"a": 7})]), torch.tensor([0]), TASKS)[0].tolist() == [7]


@pytest.mark.parametrize(
    ("items", "collate", "complaint"),
    [
        ([torch.ones(2)], None, r"should be \(input, \{task: target\}\), found Tensor"),
        ([(1, 2)], None, "found tuple"),
        ([(torch.ones(2), {}), (torch.ones(3), {})], None, "The inputs of a batch cannot be stacked"),
        ([(1, {"b": torch.ones(i)}) for i in (1, 2)], None, "The targets of task 'b' of a batch cannot be stacked"),
        ([1], lambda _: torch.ones(1), r"`collate` should return \(inputs, \{task: targets\}\), returned Tensor"),
    ],
)
def test_items_that_do_not_fit_are_a_sentence(items: list[Any], collate: Any, complaint: str) -> None:
    with pytest.raises(ProblemError, match=complaint):
        fetch(Items(items), torch.arange(len(items)), TASKS, collate)


def test_rows_are_taken_from_outputs_of_any_structure() -> None:
    x, at = torch.arange(6).view(3, 2), torch.tensor([2, 0])
    picked = select({"x": [x, (x, Pair(x, x))]}, at)
    assert isinstance(picked["x"], list) and isinstance(picked["x"][1][1], Pair)
    for leaf in (picked["x"][0], picked["x"][1][0], picked["x"][1][1].box, picked["x"][1][1].label):
        assert leaf.tolist() == [[4, 5], [0, 1]]
    assert select({"x": "anything"}, None) == {"x": "anything"}
    with pytest.raises(ProblemError, match="output or target that holds str"):
        select({"x": "anything"}, at)


def test_everything_that_can_be_moved_is_moved() -> None:
    class Movable:
        device: Any = None

        def to(self, device: torch.device) -> "Movable":
            moved = Movable()
            moved.device = device
            return moved

    meta = torch.device("meta")
    moved = move({"x": [torch.ones(2), "text"], "y": Pair(torch.ones(1), torch.ones(1)), "z": Movable()}, meta)
    assert moved["x"][0].is_meta and moved["x"][1] == "text"
    assert isinstance(moved["y"], Pair) and moved["y"].label.is_meta and moved["z"].device == meta
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert move(packed, CPU).data.tolist() == [1] * 5


def test_missing_outputs_are_all_named() -> None:
    check_outputs({"a": 1, "b": 2, "c": 3}, TASKS)
    with pytest.raises(ProblemError, match=r"no output for \['a', 'b'\], found \['c'\]"):
        check_outputs({"c": 1}, TASKS)
    with pytest.raises(ProblemError, match=r"no output for \['a', 'b'\], found Tensor"):
        check_outputs(torch.ones(2), TASKS)
