"""Data sets of the same length are told apart by what is in them; nothing that a data set does can make that fail."""

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from reconmtl.fingerprints import mark_of


class Own(TensorDataset):
    fingerprint: object = "mine"


class Method(TensorDataset):
    def fingerprint(self) -> str:  # a bound method prints its address, another one in every process
        return ""


class Augmented:
    """Random transforms, as users write them: from global states."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float, float]:
        return torch.rand(2), float(np.random.rand()), random.random()  # noqa: NPY002


class Stateful(Augmented):
    """The same from a generator of its own, which no seed of ours reaches."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        return self.draw.random()


class Broken(Augmented):
    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("no such file")


class Unknown:
    def __init__(self, value: int) -> None:
        self.value = value


class Image:
    """What PIL's images show of themselves."""

    def __init__(self, value: int) -> None:
        self.__array_interface__ = np.full((2, 2), value, np.uint8).__array_interface__
        self.keep = value


ITEM: dict[str, Any] = {"x": torch.zeros(2, 3), "y": [np.zeros(2), 1, None]}


def test_a_string_of_the_users_own_is_taken_and_nothing_else() -> None:
    x = torch.ones(4)
    assert mark_of(Own(x)) == mark_of(Own(2 * x)) == "mine"
    assert mark_of(Method(x)) == mark_of(TensorDataset(x)) != mark_of(Method(2 * x))


@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_first_the_middle_and_the_last_item_are_looked_at(place: int) -> None:
    before, after = torch.zeros(5), torch.zeros(5)
    after[place] = 1
    assert mark_of(TensorDataset(before)) == mark_of(TensorDataset(before.clone())) != mark_of(TensorDataset(after))


@pytest.mark.parametrize(
    "other",
    [
        {**ITEM, "x": torch.zeros(3, 2)},
        {**ITEM, "x": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {**ITEM, "x": torch.zeros(2, 3).to_sparse()},
        {**ITEM, "x": torch.zeros(2, 3, device="meta")},
        {**ITEM, "y": [np.zeros(2, np.float32), 1, None]},
        {**ITEM, "y": [np.array([None, 3]), 1, None]},
        {**ITEM, "y": [np.zeros(2), 2, None]},
        {**ITEM, "y": [np.zeros(2), 1, "text"]},
        {**ITEM, "y": (np.zeros(2), 1, None)},
        {**ITEM, "y": [Image(3), 1, None]},
        {**ITEM, "y": [Unknown(3), 1, None]},
        {"x": ITEM["x"], "z": ITEM["y"]},
        ITEM["x"],
        torch.tensor(1 + 2j).conj(),
        torch.empty(0),
    ],
    ids=range(15),
)
def test_whatever_an_item_holds_is_told_apart(other: Any) -> None:
    assert mark_of([other]) == mark_of([other]) != mark_of([ITEM])


def test_keys_in_another_order_are_the_same_item_and_unknown_objects_are_known_by_type_only() -> None:
    assert mark_of([ITEM]) == mark_of([dict(reversed(ITEM.items()))])
    assert mark_of([Unknown(1)]) == mark_of([Unknown(2)])
    assert mark_of([Image(1)]) != mark_of([Image(2)])
    assert mark_of([np.array([None, 3])]) != mark_of([np.array([None, 4])])
    cycle: list[Any] = []
    cycle.append(cycle)
    assert mark_of([cycle]) == mark_of([cycle])


def test_random_transforms_change_neither_the_mark_nor_the_state_they_draw_from() -> None:
    data, states = Augmented(), (torch.get_rng_state(), random.getstate())
    mark = mark_of(data)
    torch.rand(3), random.random()
    assert mark_of(data) == mark != mark_of([0, 0, 0])
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    mark_of(data)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_what_differs_every_time_or_cannot_be_read_marks_nothing() -> None:
    data = Stateful()
    assert mark_of(data) == mark_of(data) == mark_of(Broken())


def test_the_mark_is_the_same_in_another_process() -> None:
    here = mark_of([({"b": torch.arange(3), "a": {"c": 1.5}}, "text")])
    code = (
        "import torch; from reconmtl.fingerprints import mark_of\n"
        "print(mark_of([({'b': torch.arange(3), 'a': {'c': 1.5}}, 'text')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == here
