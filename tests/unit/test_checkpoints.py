import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from reconmtl.checkpoints import pack, read_checkpoint, restore_model, save_checkpoint, unpack
from reconmtl.errors import RunError

tensors = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=2).map(lambda shape: torch.ones(shape).to(dtype))
)
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors
values = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


@given(values)
def test_what_is_packed_comes_back_as_it_was(value: Any) -> None:
    kept: dict[str, Tensor] = {}
    text = json.dumps(pack(value, kept), allow_nan=False)
    assert _same(value, unpack(json.loads(text), kept))


def test_a_network_and_its_training_come_back(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    model, other = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    other.register_buffer("hidden", torch.zeros(2), persistent=False)
    save_checkpoint(path, model, {"seed": 1}, training={"step": 3, "momentum": {0: torch.ones(2)}})
    found = read_checkpoint(path)
    assert found.about == {"seed": 1}
    assert found.training["state"]["step"] == 3
    assert set(read_checkpoint(path).model) == set(model.state_dict())
    restore_model(other, found, path)
    assert torch.equal(other.get_buffer("hidden"), torch.ones(2))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(RunError, match="another network"):
        restore_model(nn.Linear(2, 2), found, path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({1, 2}, "holds a set"),
        ({1.5: 2}, "keys"),
        ([object()], "holds a object"),
        (torch.eye(2).to_sparse(), "not dense"),
    ],
)
def test_what_cannot_be_kept_is_named(value: object, told: str) -> None:
    with pytest.raises(RunError, match=told):
        pack(value, {})


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({}, "header's field 'reconmtl' is no JSON"),
        ({"reconmtl": "[" * 100_000}, "header's field 'reconmtl' is no JSON"),
        ({"reconmtl": "{}"}, "field 'format'"),
        ({"reconmtl": '{"format": "reconmtl.checkpoint/1"}'}, "field 'about'"),
        ({"reconmtl": '{"format": "reconmtl.checkpoint/1", "about": {}, "training": 3}'}, "field 'training'"),
        (
            {"reconmtl": '{"format": "reconmtl.checkpoint/1", "about": {}, "training": {"dict": [["state", 1]]}}'},
            "field 'training'",
        ),
    ],
)
def test_a_damaged_header_names_the_field(header: dict[str, str], told: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "last.ckpt", metadata=header)
    with pytest.raises(RunError, match=rf"last\.ckpt.*{told}"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("~0", torch.ones(1))
    with pytest.raises(RunError, match="'~0'"):
        save_checkpoint(tmp_path / "x", model, {})
