"""Composition against a slow oracle; the three ways to have the set."""

import gzip
import hashlib
import importlib.resources
import json
import os
import pickle
import struct
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
from reconmtl.problems.multifashion import make
from reconmtl.problems.multifashion_data import (
    MultiFashion,
    build_full,
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


def write_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def assert_same(path: Path, arrays: list[NDArray[Any]]) -> None:
    train, test = load_published(path)
    for split, images, labels in zip((train, test), arrays[::2], arrays[1::2], strict=True):
        assert np.array_equal(split.images.numpy(), images.reshape(-1, 36, 36))
        assert np.array_equal(split.labels.numpy(), labels)
    assert (train.name, test.name) == ("multifashion-published-train", "multifashion-published-test")


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a,
        lambda a: a.astype(">f8"),
        lambda a: a.reshape(len(a), 1, *a.shape[1:]) if a.ndim == 3 else a,
        lambda a: a.reshape(len(a), -1),
        np.asfortranarray,
    ],
    ids=["plain", "floats", "channel", "flat", "fortran"],
)
def test_the_published_form_is_read(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    assert_same(write_pickle(tmp_path / "p", [change(a) for a in published()]), published())


def test_a_published_file_that_would_run_something_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "evil.pickle", (*published()[:3], os.getcwd))
    with pytest.raises(DataError, match=r"evil\.pickle holds the name .*getcwd.*nothing in it was run"):
        load_published(path)


def _with(position: int, value: Any) -> Callable[[list[Any]], object]:
    return lambda arrays: [value(a) if i == position else a for i, a in enumerate(arrays)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a[:3], r"expected \(training images, .*\), found 3 entries"),
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


def test_a_set_lies_on_a_device_once_and_its_batches_are_made_there() -> None:
    train, _ = load_mini()
    assert train.on(torch.device("cpu")) is train
    meta = torch.device("meta")  # a device without memory stands for an accelerator
    there = train.on(meta)
    assert there is train.on(meta) and there.images.device == meta and train.images.device.type == "cpu"
    inputs, targets = make().batch(train, torch.tensor([3, 1]), meta)
    assert inputs.device == meta and inputs.shape == (2, 1, 36, 36)
    assert all(values.device == meta for values, _ in targets.values())
    assert pickle.loads(pickle.dumps(train)).fingerprint == train.fingerprint == there.fingerprint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_device_are_those_of_the_cpu() -> None:
    train, _ = load_mini()
    at, gpu = torch.tensor([5, 0, 17]), torch.device("cuda", 0)
    (ours, of), (theirs, expected) = make().batch(train, at, gpu), train.batch(at)
    assert torch.allclose(ours.cpu(), theirs) and all(torch.equal(of[t][0].cpu(), v) for t, v in expected.items())
