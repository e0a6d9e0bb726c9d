"""Drawn rooms: what is known about a pixel agrees with what is known about its neighbours."""

import numpy as np
import pytest
from numpy.typing import NDArray

from reconmtl.errors import DataError
from reconmtl.problems.rooms import CLASSES, COARSE, PARTS, Room, draw

ROOMS = [draw(i, seed=3) for i in range(24)]
SPREAD = 0.75


def points(room: Room) -> NDArray[np.float64]:
    """Where each pixel's surface is, in the camera's frame [3, H, W], from depth alone."""
    height, width = room.depth.shape
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack(
        [(x - width / 2) / (height / 2) * SPREAD, (y - height / 2) / (height / 2) * SPREAD, np.ones_like(x)]
    )
    return rays * room.depth


def test_rooms_follow_from_seed_and_index_alone() -> None:
    again = draw(5, seed=3)
    assert all(np.array_equal(getattr(again, n), getattr(ROOMS[5], n)) for n in Room._fields)
    assert not np.array_equal(draw(5, seed=4).image, ROOMS[5].image)
    assert len({r.image.tobytes() for r in ROOMS}) == len(ROOMS)


def test_neighbours_on_one_plane_differ_at_right_angles_to_the_normal() -> None:
    """Depth and normals are found by different code: differences of points from depth lie in the surface."""
    compared = 0
    for room in ROOMS:
        where = points(room)
        for axis in (1, 2):
            step = np.diff(where, axis=axis)
            normal = room.normal.take(range(room.normal.shape[axis] - 1), axis)
            other = room.normal.take(range(1, room.normal.shape[axis]), axis)
            same = (np.abs(normal - other).max(0) < 1e-6) & (np.abs(normal).max(0) > 0)
            known = room.depth > 0
            same &= known.take(range(known.shape[axis - 1] - 1), axis - 1) & known.take(
                range(1, known.shape[axis - 1]), axis - 1
            )
            edge = room.edge.take(range(known.shape[axis - 1] - 1), axis - 1) == 0
            along = np.abs((step * normal).sum(0))[same & edge]
            length = np.linalg.norm(step, axis=0)[same & edge]
            assert np.quantile(along / length, 0.97) < 2e-3  # two parts of one person may lie behind each other
            compared += len(along)
    assert compared > 100_000


def test_normals_have_length_one_face_the_camera_and_are_missing_where_depth_is() -> None:
    for room in ROOMS:
        known = room.depth > 0
        assert np.allclose(np.linalg.norm(room.normal, axis=0)[known], 1, atol=1e-3)
        assert not room.normal[:, ~known].any()
        assert ((points(room) * room.normal).sum(0)[known] < 1e-4).all()
        assert np.array_equal(~known, room.semantic == CLASSES.index("window"))


def test_labels_change_only_at_edges_and_parts_belong_to_people() -> None:
    for room in ROOMS:
        labels = np.where(room.semantic == -1, CLASSES.index("picture"), room.semantic)
        assert (room.edge[:, :-1] >= (labels[:, :-1] != labels[:, 1:])).all()
        assert (room.edge[:-1] >= (labels[:-1] != labels[1:])).all()
        person = room.semantic == CLASSES.index("person")
        if person.any():
            assert np.array_equal(room.parts > 0, person)
            assert room.parts.max() < len(PARTS)
        else:
            assert (room.parts == 255).all()


def test_what_stands_out_is_one_movable_thing_and_nothing_large_is_nearer() -> None:
    fixed = [CLASSES.index(n) for n in ("floor", "wall", "ceiling", "picture", "window", "door", "rug")]
    seen = 0
    for room in ROOMS:
        chosen = room.saliency == 1
        if chosen.any():
            assert len(np.unique(room.semantic[chosen])) == 1
            assert not np.isin(room.semantic[chosen], fixed).any()
            seen += 1
    assert seen > len(ROOMS) / 2


def test_every_class_and_part_occurs_and_labels_map_onto_seven() -> None:
    semantic = np.concatenate([r.semantic.ravel() for r in ROOMS])
    assert set(np.unique(semantic)) == set(range(-1, 13))
    parts = np.concatenate([r.parts.ravel() for r in ROOMS])
    assert set(np.unique(parts)) == {*range(7), 255}
    assert sorted(set(COARSE)) == list(range(7)) and len(COARSE) == len(CLASSES)


def test_any_size_and_nothing_that_is_none() -> None:
    room = draw(0, size=(48, 40))
    assert room.image.shape == (3, 48, 40) and room.image.dtype == np.uint8 and room.image.std() > 10
    with pytest.raises(DataError, match="at least 8"):
        draw(0, size=(4, 40))
    with pytest.raises(DataError, match="negatives"):
        draw(-1)
