"""Composition against a slow oracle; the three ways to have the set; a pickle that may hold anything."""

import gzip
import hashlib
import importlib.resources
import io
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from reconmtl.errors import DataError, RunError
from reconmtl.problems import idx, multifashion_data
from reconmtl.problems.multifashion_data import (
    MultiFashion,
    build_full,
    cache_folder,
    compose,
    content_hash,
    load_full,
    load_mini,
    load_published,
)

Bytes = NDArray[np.uint8]


def parts(count: int, *, low: int = 0, high: int = 256, seed: int = 0) -> tuple[Bytes, Bytes]:
    """Random images [count, 28, 28] and labels [count]."""
    random = np.random.default_rng(seed)
    images = random.integers(low, high, size=(count, 28, 28), dtype=np.uint8)
    return images, random.integers(10, size=count, dtype=np.uint8)


def all_places(digit: Bytes, item: Bytes, composed: Bytes) -> list[tuple[int, int, int, int]]:
    """The slow oracle: every pair of corners that gives exactly this image, found by trying all 625, pixel by pixel."""
    found = []
    for top in range(5):
        for left in range(5):
            first = np.zeros((36, 36), np.uint8)
            first[top : top + 28, left : left + 28] = digit
            for down in range(4, 9):
                for right in range(4, 9):
                    second = np.zeros((36, 36), np.uint8)
                    second[down : down + 28, right : right + 28] = item
                    if (np.where(first > second, first, second) == composed).all():
                        found.append((top, left, down, right))
    return found


# Composition. ---------------------------------------------------------------------------------------------------------


@given(digits=st.integers(1, 4), items=st.integers(1, 4), copies=st.integers(1, 3), seed=st.integers(0, 2**64))
@settings(max_examples=10, deadline=None)
def test_every_image_is_one_digit_and_one_garment_at_allowed_places(
    digits: int, items: int, copies: int, seed: int
) -> None:
    digit, digit_label = parts(digits, seed=1)
    item, item_label = parts(items, seed=2)
    images, labels = compose(digit, digit_label, item, item_label, seed=seed, copies=copies)
    assert images.shape == (digits * copies, 36, 36) and images.dtype == np.uint8
    assert labels.shape == (digits * copies, 2) and labels.dtype == np.uint8
    for i, composed in enumerate(images):
        base = i % digits
        partners = [g for g in range(items) if all_places(digit[base], item[g], composed)]
        assert len(partners) == 1
        assert list(labels[i]) == [digit_label[base], item_label[partners[0]]]


def test_corners_and_partners_are_uniform_and_independent() -> None:
    # A part of constant brightness shows its corner: the digit is darker, so the garment covers it.
    digit, digit_label = parts(1000, low=100, high=101)
    item, _ = parts(10, low=200, high=201)
    item += np.arange(10, dtype=np.uint8)[:, None, None]
    images, labels = compose(digit, digit_label, item, np.arange(10, dtype=np.uint8), seed=5, copies=20)
    rows, columns = images.max(axis=2), images.max(axis=1)
    corners = np.stack(
        [(rows > 0).argmax(1), (columns > 0).argmax(1), (rows >= 200).argmax(1), (columns >= 200).argmax(1)]
    )
    # A garment that starts above or left of the digit hides where the digit starts; here that cannot be.
    assert corners[:2].max() == 4 and corners[2:].min() == 4 and corners[2:].max() == 8
    assert np.array_equal(images.max(axis=(1, 2)) - 200, labels[:, 1])
    drawn = [*(corners - np.array([[0], [0], [4], [4]])), labels[:, 1]]
    for variable, sides in zip(drawn, (5, 5, 5, 5, 10), strict=True):
        _assert_uniform(variable, sides)
    for i, (one, n) in enumerate(zip(drawn, (5, 5, 5, 5, 10), strict=True)):
        for other, m in list(zip(drawn, (5, 5, 5, 5, 10), strict=True))[i + 1 :]:
            _assert_uniform(one.astype(int) * m + other, n * m)


def _assert_uniform(drawn: NDArray[Any], sides: int) -> None:
    expected = len(drawn) / sides
    chi2 = float(((np.bincount(drawn, minlength=sides) - expected) ** 2 / expected).sum())
    assert chi2 < sides - 1 + 5 * (2 * (sides - 1)) ** 0.5


def test_a_part_alone_is_moved_and_not_changed() -> None:
    digit, label = parts(50, low=1)
    dark = np.zeros((1, 28, 28), np.uint8)
    zero = np.zeros(1, np.uint8)
    for images, origin in (
        (compose(digit, label, dark, zero, seed=0, copies=1)[0], 0),
        (compose(np.repeat(dark, 50, 0), np.repeat(zero, 50), digit[:1], label[:1], seed=0, copies=1)[0], 4),
    ):
        for i, image in enumerate(images):
            rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
            assert len(rows) == len(columns) == 28
            assert origin <= rows[0] <= origin + 4 and origin <= columns[0] <= origin + 4
            assert np.array_equal(image[np.ix_(rows, columns)], digit[i if origin == 0 else 0])


def test_equal_seeds_give_equal_images_and_others_do_not() -> None:
    args = (*parts(40, seed=1), *parts(40, seed=2))
    one, other, third = (compose(*args, seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(one, other) and not np.array_equal(one, third)


def test_composing_leaves_inputs_and_global_random_state_alone() -> None:
    args = (*parts(5, seed=1), *parts(5, seed=2))
    for a in args:
        a.flags.writeable = False
    before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    compose(*args, seed=0)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002


def test_inputs_that_do_not_fit_are_all_named() -> None:
    images, labels = parts(3)
    with pytest.raises(DataError) as caught:
        compose(images.astype(float), labels[:2], images[:, :27], labels, seed=0)
    message = str(caught.value)
    assert "digits: float64 [3, 28, 28]" in message and "digit_labels: uint8 [2] for 3 images" in message
    assert "items: uint8 [3, 27, 28]" in message and "item_labels" not in message
    with pytest.raises(DataError, match="items: uint8"):
        compose(images, labels, images[:0], labels[:0], seed=0)
    with pytest.raises(DataError, match="seed = -1 cannot be used"):
        compose(images, labels, images, labels, seed=-1)


# The set. -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini() -> tuple[MultiFashion, MultiFashion]:
    return load_mini()


def small(count: int = 6, *, seed: int = 0) -> MultiFashion:
    random = np.random.default_rng(seed)
    images = random.integers(256, size=(count, 36, 36), dtype=np.uint8)
    return MultiFashion(images, random.integers(10, size=(count, 2)))


def test_items_are_floats_from_0_to_1_with_two_labels() -> None:
    images = np.zeros((1, 36, 36), np.uint8)
    images[0, 0, :3] = 0, 51, 255
    x, targets = MultiFashion(images, np.array([[3, 8]]))[0]
    assert x.shape == (1, 36, 36) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, 0, :3], torch.tensor([0, 0.2, 1]), rtol=0, atol=0)
    assert {key: (y.shape, y.dtype, int(y)) for key, y in targets.items()} == {
        "digit": (torch.Size([]), torch.int64, 3),
        "fashion": (torch.Size([]), torch.int64, 8),
    }


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_a_batch_is_its_items_stacked(indices: list[int]) -> None:
    data = small()
    x, targets = data.batch(torch.tensor(indices))
    items = [data[i] for i in indices]
    assert torch.equal(x, torch.stack([item[0] for item in items])) and x.dtype == torch.float32
    assert targets.keys() == {"digit", "fashion"}
    for key, y in targets.items():
        assert torch.equal(y, torch.stack([item[1][key] for item in items])) and y.dtype == torch.int64


def test_the_set_works_with_a_data_loader_and_ends() -> None:
    data = small()
    (batch,) = DataLoader(data, batch_size=6)
    expected = data.batch(torch.arange(6))
    assert torch.equal(batch[0], expected[0]) and torch.equal(batch[1]["digit"], expected[1]["digit"])
    with pytest.raises(IndexError):
        data[6]


def test_changing_a_batch_does_not_change_the_set() -> None:
    data = small()
    before = data.images.clone()
    data.batch(torch.arange(6))[0].zero_()
    data[0][0].zero_()
    assert torch.equal(data.images, before)


def test_the_fingerprint_follows_the_content_and_nothing_else() -> None:
    one = small()
    same = MultiFashion(one.images.clone(), one.labels.to(torch.uint8), name="other")
    images, labels = one.images.clone(), one.labels.clone()
    images[5, 35, 35] ^= 1
    labels[5, 1] = (labels[5, 1] + 1) % 10
    prints = {
        one.fingerprint,
        MultiFashion(images, one.labels).fingerprint,
        MultiFashion(one.images, labels).fingerprint,
    }
    assert same.fingerprint == one.fingerprint and len(prints) == 3
    assert len(one.fingerprint) == 16


def test_a_content_hash_tells_names_dtypes_and_shapes_apart() -> None:
    a = np.arange(6, dtype=np.uint8)
    variants: list[dict[str, NDArray[Any]]] = [
        {"a": a},
        {"b": a},
        {"a": a.reshape(2, 3)},
        {"a": a.view(np.int8)},
        {"a": a[::-1]},
        {"a": a[:0]},
    ]
    assert len({content_hash(v) for v in variants}) == len(variants)
    assert content_hash({"a": a, "b": a}) == content_hash({"b": a, "a": np.stack([a, a], 1)[:, 0]})


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (np.zeros((2, 36, 36)), np.zeros((2, 2)), "images should be uint8"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros((2, 2)), r"found torch.uint8 \[2, 28, 28\]"),
        (np.zeros((2, 36, 36), np.uint8), np.zeros((3, 2)), r"labels should be \[2, 2\] like the images"),
        (np.zeros((2, 36, 36), np.uint8), np.full((2, 2), 10), "labels should be 0..9, found 10..10"),
        (np.zeros((2, 36, 36), np.uint8), np.full((2, 2), -1), "labels should be 0..9, found -1..-1"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(images: Bytes, labels: Bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=f"name it: .*{complaint}"):
        MultiFashion(images, labels, name="name it")


# The mini set. --------------------------------------------------------------------------------------------------------


def test_the_mini_set_is_what_it_always_was(mini: tuple[MultiFashion, MultiFashion]) -> None:
    train, test = mini
    assert (len(train), len(test)) == (12000, 2000)
    assert (train.name, test.name) == ("multifashion-mini-train", "multifashion-mini-test")
    assert (train.fingerprint, test.fingerprint) == ("b68892bc0a08f663", "51e8c5236a14a449")


def test_the_mini_set_starts_with_the_first_digits_of_mnist(mini: tuple[MultiFashion, MultiFashion]) -> None:
    train, test = mini
    first = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert train.labels[:10, 0].tolist() == first == train.labels[6000:6010, 0].tolist()
    assert test.labels[:10, 0].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert all(0.07 < share < 0.13 for share in torch.bincount(train.labels[:, 1]) / len(train))


def test_partners_never_come_from_the_other_split(mini: tuple[MultiFashion, MultiFashion]) -> None:
    """The garment of a training image is found among the training garments, not among the test garments; and so on."""
    with np.load(Path(multifashion_data.__file__).with_name("multifashion_mini.npz")) as stored:
        garments = {"train": stored["fashion-mnist_train_images"], "test": stored["fashion-mnist_t10k_images"]}
    for images, own, other in ((mini[0].images, "train", "test"), (mini[1].images, "test", "train")):
        for image in images[:12].numpy():
            # Right of column 32 and below row 32 there is no digit: what is there is the garment alone.
            assert any(_holds(image, garments[own], down, right) for down in range(4, 9) for right in range(4, 9))
            assert not any(_holds(image, garments[other], down, right) for down in range(4, 9) for right in range(4, 9))


def _holds(image: Bytes, garments: Bytes, down: int, right: int) -> bool:
    """Whether one of the garments, at this corner, explains all that no digit can reach and is nowhere brighter."""
    window = image[down : down + 28, right : right + 28]
    outside = np.ones((36, 36), bool)
    outside[:32, :32] = False
    inside = outside[down : down + 28, right : right + 28]
    beyond = image[outside].astype(int).sum() != window[inside].astype(int).sum()
    if beyond:
        return False
    candidates = garments[(garments[:, inside] == window[inside]).all(1)]
    return bool((candidates <= window).all((1, 2)).any())


def test_another_seed_gives_other_images_of_the_same_digits(mini: tuple[MultiFashion, MultiFashion]) -> None:
    train, test = load_mini(seed=1)
    assert train.fingerprint != mini[0].fingerprint and test.fingerprint != mini[1].fingerprint
    assert torch.equal(train.labels[:, 0], mini[0].labels[:, 0])


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_a_seed_must_be_a_whole_number(seed: int) -> None:
    with pytest.raises(DataError, match="expected a whole number, 0 or more"):
        load_mini(seed)


def test_a_mini_set_that_is_not_the_shipped_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multifashion_data, "MINI_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"is damaged: content sha256 cae789db.*Reinstall reconmtl"):
        load_mini()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda _: b"", lambda _: None])
def test_a_mini_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes | None]
) -> None:
    content = damage(Path(multifashion_data.__file__).with_name("multifashion_mini.npz").read_bytes())
    if content is not None:
        (tmp_path / "multifashion_mini.npz").write_bytes(content)
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(DataError, match=r"multifashion_mini\.npz cannot be read: .*Reinstall reconmtl"):
        load_mini()


# The full set. --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, Bytes]]:
    """Eight generated files in the original form, the table that knows them, and their arrays."""
    folder = tmp_path_factory.mktemp("originals")
    checksums, contents = {}, {}
    for i, name in enumerate(idx.CHECKSUMS):
        images, labels = parts(30 if "train" in name else 10, seed=i)
        contents[name] = array = images if "images" in name else labels
        raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        checksums[name] = hashlib.sha256(raw).hexdigest()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw, 1))
    return folder, checksums, contents


Originals = tuple[Path, dict[str, str], dict[str, Bytes]]


def test_the_full_set_is_composed_kept_and_read_back(tmp_path: Path, originals: Originals) -> None:
    source, checksums, contents = originals
    assert build_full(source, cache=tmp_path, seed=4, checksums=checksums) == tmp_path / "multifashion"
    for stream, (prefix, split) in enumerate(zip(("train", "t10k"), load_full(cache=tmp_path), strict=True)):
        stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        arrays = [contents[f"{s}/{stem}"] for s in ("mnist", "fashion-mnist") for stem in stems]
        images, labels = compose(*arrays, seed=(4, stream))
        assert np.array_equal(split.images.numpy(), images) and np.array_equal(split.labels.numpy(), labels)
    train, test = load_full(cache=tmp_path)
    assert (len(train), len(test)) == (60, 20)
    assert (train.name, test.name) == ("multifashion-train", "multifashion-test")
    described = json.loads((tmp_path / "multifashion/multifashion.json").read_text())
    assert described["seed"] == 4 and described["sources"] == checksums
    assert described["train"] == {"count": 60, "sha256": train.sha256}
    assert train.sha256.startswith(train.fingerprint)


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "multifashion").iterdir()}


def test_a_whole_set_is_kept_and_a_damaged_one_built_anew(tmp_path: Path, originals: Originals) -> None:
    source, checksums, _ = originals
    build_full(source, cache=tmp_path, checksums=checksums)
    before, fingerprint = stamps(tmp_path), load_full(cache=tmp_path)[0].fingerprint
    build_full(source, cache=tmp_path, checksums=checksums)
    assert stamps(tmp_path) == before and len(before) == 2
    data = tmp_path / "multifashion/multifashion.safetensors"
    data.write_bytes(data.read_bytes()[:-7])
    build_full(source, cache=tmp_path, checksums=checksums)
    assert load_full(cache=tmp_path)[0].fingerprint == fingerprint


def test_a_set_of_another_seed_is_only_replaced_on_request(tmp_path: Path, originals: Originals) -> None:
    source, checksums, _ = originals
    build_full(source, cache=tmp_path, checksums=checksums)
    fingerprint = load_full(cache=tmp_path)[0].fingerprint
    with pytest.raises(DataError, match=r"holds a set of seed 0, not 1, .*--overwrite"):
        build_full(source, cache=tmp_path, seed=1, checksums=checksums)
    assert load_full(cache=tmp_path)[0].fingerprint == fingerprint
    build_full(source, cache=tmp_path, seed=1, overwrite=True, checksums=checksums)
    assert load_full(cache=tmp_path)[0].fingerprint != fingerprint


def test_sources_are_verified_before_anything_is_written(tmp_path: Path, originals: Originals) -> None:
    source, _, _ = originals
    with pytest.raises(DataError, match=r"8 fault\(s\)"):
        build_full(source, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_build_that_fails_half_way_leaves_no_set(
    tmp_path: Path, originals: Originals, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, checksums, _ = originals
    build_full(source, cache=tmp_path, checksums=checksums)

    def full_disk(*_: object) -> None:
        raise RunError("Cannot write: no space left.")

    monkeypatch.setattr(multifashion_data, "write_bytes", full_disk)
    with pytest.raises(RunError):
        build_full(source, cache=tmp_path, seed=1, overwrite=True, checksums=checksums)
    with pytest.raises(DataError, match="is not in"):
        load_full(cache=tmp_path)


def test_a_missing_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_full(cache=tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "multifashion") in message and "mini set" in message and "needs nothing" in message
    assert "\n  reconmtl data multifashion --from DIR " in message
    assert "\n  reconmtl data multifashion --download " in message


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda _, data: data.unlink(), "cannot be read"),
        (lambda _, data: data.write_bytes(b"short"), "cannot be read"),
        (lambda _, data: _flip(data, -5), "is damaged: sha256 of its t"),
        (lambda manifest, _: manifest.write_text("{"), "cannot be read as JSON"),
        (lambda manifest, _: manifest.write_text("{}"), "is not the description of a set"),
        (lambda manifest, _: manifest.write_text(manifest.read_text().replace("/1", "/2")), "is not the description"),
    ],
    ids=["no data", "short data", "flipped bit", "cut manifest", "empty manifest", "other format"],
)
def test_a_damaged_set_is_named_with_the_way_out(
    tmp_path: Path, originals: Originals, damage: Callable[[Path, Path], object], complaint: str
) -> None:
    source, checksums, _ = originals
    folder = build_full(source, cache=tmp_path, checksums=checksums)
    damage(folder / "multifashion.json", folder / "multifashion.safetensors")
    with pytest.raises(DataError, match=complaint) as caught:
        load_full(cache=tmp_path)
    assert str(folder) in str(caught.value) and "--from DIR" in str(caught.value)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"RECONMTL_CACHE": "/data/here", "XDG_CACHE_HOME": "/xdg"}, "/data/here"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/reconmtl"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/reconmtl"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/reconmtl"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/reconmtl"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/reconmtl"),
        ("win32", {}, "/home/me/AppData/Local/reconmtl"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("RECONMTL_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", "USERPROFILE": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected)


def test_the_default_cache_is_used(tmp_path: Path, originals: Originals, monkeypatch: pytest.MonkeyPatch) -> None:
    source, checksums, _ = originals
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path))
    assert build_full(source, checksums=checksums) == tmp_path / "multifashion"
    assert len(load_full()[0]) == 60


# The published file. --------------------------------------------------------------------------------------------------


def published(train: int = 7, test: int = 3) -> list[NDArray[Any]]:
    random = np.random.default_rng(1)
    arrays: list[NDArray[Any]] = []
    for count in (train, test):
        arrays += [random.integers(256, size=(count, 36, 36)), random.integers(10, size=(count, 2))]
    arrays[0][0, 0, :2] = 0, 255
    return arrays


def write_pickle(path: Path, content: object, *, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def assert_same(path: Path, arrays: list[NDArray[Any]]) -> None:
    train, test = load_published(path)
    for split, images, labels in zip((train, test), arrays[::2], arrays[1::2], strict=True):
        assert np.array_equal(split.images.numpy(), images.reshape(-1, 36, 36))
        assert np.array_equal(split.labels.numpy(), labels)
    assert (train.name, test.name) == ("multifashion-published-train", "multifashion-published-test")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8", ">i4"])
def test_arrays_of_every_protocol_and_dtype_are_read(tmp_path: Path, protocol: int, dtype: str) -> None:
    arrays = [a.astype(dtype) for a in published()]
    assert_same(write_pickle(tmp_path / "p", tuple(arrays), protocol=protocol), published())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.reshape(len(a), 1, *a.shape[1:]) if a.ndim == 3 else a,
        lambda a: a.reshape(len(a), -1),
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    ],
    ids=["channel", "flat", "fortran", "strided"],
)
def test_shapes_and_layouts_are_read(tmp_path: Path, protocol: int, change: Callable[[Any], Any]) -> None:
    arrays = [change(a) for a in published()]
    assert_same(write_pickle(tmp_path / "p", arrays, protocol=protocol), published())


@pytest.mark.parametrize("protocol", range(6))
def test_old_and_new_names_of_numpys_modules_are_known(tmp_path: Path, protocol: int) -> None:
    path = write_pickle(tmp_path / "p", tuple(published()), protocol=protocol)
    content = path.read_bytes()
    old, new = b"numpy.core.", b"numpy._core."
    here, there = (new, old) if new in content else (old, new)
    assert here in content
    if protocol < 4:
        path.write_bytes(content.replace(here, there))
    else:  # these protocols say how long a name is
        for module in (b"multiarray", b"numeric"):
            name, other = here + module, there + module
            content = content.replace(bytes([len(name)]) + name, bytes([len(other)]) + other)
        # ... and how long the first frame is; without frames the rest is still a whole pickle.
        path.write_bytes(content[:2] + content[11:])
    assert (there in path.read_bytes()) and here not in path.read_bytes()
    assert_same(path, published())


def python2(arrays: list[NDArray[Any]]) -> bytes:
    """The same tuple as Python 2 with an old NumPy pickled it under protocol 2: raw data are its `str`."""
    out = io.BytesIO()
    out.write(b"\x80\x02(")
    for a in arrays:
        raw = a.astype("<i8").tobytes()
        out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(")
        out.write(b"".join(b"J" + struct.pack("<i", n) for n in a.shape) + b"t")
        out.write(b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        out.write(b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb")
    out.write(b"t.")
    return out.getvalue()


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(python2(published()))
    assert_same(tmp_path / "p", published())


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_a_command_in_the_file_is_not_run_and_named(tmp_path: Path, protocol: int, place: str) -> None:
    attack = Attack(tmp_path / "ran")
    array = np.empty(1, dtype=object)
    array[0] = attack
    content = {"alone": attack, "beside": (*published(), attack), "inside": (array, *published()[1:])}[place]
    path = write_pickle(tmp_path / "evil.pickle", content, protocol=protocol)
    expected = r"system|array of dtype 'O8'" if place == "inside" else rf"the name {os.name}\.system"
    with pytest.raises(DataError, match=rf"evil\.pickle holds .*({expected}).*nothing in it was run"):
        load_published(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have been


@pytest.mark.parametrize(
    "forbidden",
    [
        b"cbuiltins\neval\n.",
        b"c__builtin__\neval\n.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray.__class__\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cfunctools\npartial\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    ],
)
def test_names_that_no_array_needs_are_refused(tmp_path: Path, forbidden: bytes) -> None:
    (tmp_path / "p").write_bytes(forbidden)
    with pytest.raises(DataError, match=r"holds the name .*, which no array of numbers needs"):
        load_published(tmp_path / "p")


def test_functions_that_are_known_cannot_be_changed_by_the_file(tmp_path: Path) -> None:
    # BUILD with a second state would set attributes on whatever function was named.
    (tmp_path / "p").write_bytes(b"\x80\x02c_codecs\nencode\nN}X\x04\x00\x00\x00evilK\x01s\x86b.")
    with pytest.raises(DataError, match="an attempt to change a function"):
        load_published(tmp_path / "p")


def state(shape: bytes, raw: bytes, dtype: bytes = b"u1") -> bytes:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    kind = b"cnumpy\ndtype\n(X" + struct.pack("<i", len(dtype)) + dtype + b"I00\nI01\ntR"
    return b"\x80\x03" + array + b"(K\x01" + shape + kind + b"I00\nC" + bytes([len(raw)]) + raw + b"tb."


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (state(b"K\x03\x85", b"ab"), r"shape \(3,\) and dtype uint8 in 2 bytes"),
        (state(b"\x8a\x08" + b"\xff" * 7 + b"\x0f\x85", b"ab"), r"in 2 bytes"),  # 2**60: nothing is allocated
        (state(b"J\xff\xff\xff\xff\x85", b"ab"), r"of shape \(-1,\)"),
        (state(b"K\x03", b"abc"), "of shape 3"),
        (state(b"K\x03\x85", b"abc", b"O8"), "of dtype 'O8'"),
        (state(b"K\x03\x85", b"abc", b"V3"), "of dtype 'V3'"),
        (state(b"K\x03\x85", b"abc", b"S1"), "of dtype 'S1'"),
        (state(b"K\x01\x85", b"abcdefgh", b"M8"), "of dtype 'M8'"),
    ],
    ids=["short", "huge", "negative", "no tuple", "object", "void", "text", "date"],
)
def test_arrays_that_do_not_match_their_bytes_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_published(tmp_path / "p")


@given(cut=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_file_that_is_cut_off_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.pickle"
    content = pickle.dumps(tuple(published(2, 1)), protocol=cut % 6)
    path.write_bytes(content[: len(content) * cut // 201])
    with pytest.raises(DataError, match=r"cut\.pickle"):
        load_published(path)


def _with(position: int, value: Any) -> Callable[[list[Any]], object]:  # noqa: ANN401
    return lambda arrays: [value(a) if i == position else a for i, a in enumerate(arrays)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a[:3], "found 3 entries"),
        (lambda a: dict(enumerate(a)), "found dict"),
        (lambda a: a[0], "found one array"),
        (_with(1, lambda a: a.tolist()), "training labels should be an array of numbers, found list"),
        (_with(0, lambda a: a + 1), r"training images: values should be 0\.\.255, found 1\.\.256"),
        (_with(2, lambda a: a - 300), r"test images: values should be 0\.\.255"),
        (_with(0, lambda a: a / 255), "training images: values should be whole numbers"),
        (_with(0, lambda a: np.where(a == 255, np.nan, a)), "found nan..nan"),
        (_with(3, lambda a: a + 10), r"test labels: values should be 0\.\.9"),
        (_with(1, lambda a: a[:-1]), r"training images \[7, 36, 36\] are not 6"),
        (_with(0, lambda a: a[:, :35]), r"training images \[7, 35, 36\] are not 7"),
        (_with(0, lambda a: a.transpose(1, 2, 0)), r"training images \[36, 36, 7\] are not 7"),
        (_with(1, lambda a: a[:, 0]), r"training labels should be \[N, 2\] with N > 0, found \[7\]"),
        (_with(1, lambda a: a.T), r"found \[2, 7\]"),
        (lambda a: [a[0][:0], a[1][:0], *a[2:]], r"found \[0, 2\]"),
        (_with(1, lambda _: np.array(3)), r"found \[\]"),
    ],
)
def test_content_that_is_not_the_published_form_is_refused(
    tmp_path: Path, change: Callable[[list[Any]], object], complaint: str
) -> None:
    path = write_pickle(tmp_path / "some.pickle", change(published()))
    with pytest.raises(DataError, match=rf"some\.pickle.*{complaint}"):
        load_published(path)


def test_a_published_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.pickle cannot be read: No such file"):
        load_published(tmp_path / "none.pickle")
