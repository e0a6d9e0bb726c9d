"""Rooms drawn by ray casting: images with exact labels, depth, normals, edges, saliency and parts, without a download.

A room has four walls, some with a window, a door or a picture; in it stand furniture, balls, a lamp and sometimes a
person made of parts. One lamp lights it, without shadows. Everything follows from a seed and an index.

Cameras look along +z, x goes right, y down. Depth is the distance along z [metres], normals are in the camera's
frame and point towards it. Windows have neither, as sensors find none.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reconmtl.errors import DataError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CLASSES = (
    "floor", "wall", "ceiling", "cabinet", "table", "bed", "ball", "lamp", "picture", "window", "door", "person", "rug",
)  # fmt: skip
"""Names of the 13 classes, by label."""
COARSE = (0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 0)
"""The 13 classes as 7: floor, wall, cabinet, low furniture, round things, what hangs on walls, person."""
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
"""Names of the parts of a person, by label."""

_ID = {name: i for i, name in enumerate(CLASSES)}
_COLORS = np.array(
    [
        (0.55, 0.42, 0.30), (0.80, 0.78, 0.70), (0.92, 0.92, 0.90), (0.50, 0.33, 0.20), (0.62, 0.45, 0.28),
        (0.45, 0.50, 0.70), (0.80, 0.25, 0.20), (0.95, 0.90, 0.55), (0.35, 0.55, 0.45), (0.60, 0.80, 0.95),
        (0.58, 0.38, 0.25), (0.85, 0.65, 0.52), (0.60, 0.25, 0.30),
    ],
    dtype=np.float32,
)  # fmt: skip


class Room(NamedTuple):
    """One drawn image and everything known about it; [H, W] unless said otherwise.

    Attributes:
        image: [3, H, W] uint8.
        semantic: Labels 0..12 of `CLASSES`, -1 where frames are too thin to be labelled; int8.
        depth: Metres, 0 where there is none; float32.
        normal: [3, H, W] float32, zeros where there is none.
        edge: 1 where the thing seen ends; uint8.
        saliency: 1 on the thing that stands out most; uint8.
        parts: Labels 0..6 of `PARTS`; uint8, all 255 without a person.
    """

    image: Bytes
    semantic: NDArray[np.int8]
    depth: Floats
    normal: Floats
    edge: Bytes
    saliency: Bytes
    parts: Bytes


@dataclass
class _View:
    """The rays of a camera, and the nearest hit found so far along each of them."""

    origin: Floats
    rays: Floats  # [3, N], in the world's frame; one unit is one metre along the camera's z
    near: Floats
    thing: NDArray[np.int16]
    label: NDArray[np.int8]
    part: Bytes
    normal: Floats  # [3, N], in the world's frame
    texture: Floats  # [2, N]: coordinates on the surface [metres]
    things: int = 0
    tints: list[Floats] = field(default_factory=list)

    def hit(
        self, at: NDArray[np.intp], t: Floats, label: int, normal: Floats, texture: Floats, *, part: int = 0
    ) -> None:
        """Note what rays `at` [n] meet at distances `t` [n], where that is nearer than before; normals [3, n]."""
        closer = t < self.near[at]
        at = at[closer]
        self.near[at], self.thing[at], self.label[at], self.part[at] = t[closer], self.things, label, part
        self.normal[:, at], self.texture[:, at] = normal[:, closer], texture[:, closer]

    def begin(self, tint: Floats) -> None:
        """Go on with another thing of this colour (a factor per channel)."""
        self.things += 1
        self.tints.append(tint)


def draw(index: int, *, seed: int = 0, size: tuple[int, int] = (64, 96)) -> Room:
    """Draw a room.

    Args:
        index: Which one; equal seeds and indices give equal rooms.
        seed: Of the whole series.
        size: Height and width [pixels].

    Raises:
        DataError: If the size is not two whole numbers of at least 8, or seed or index are negative.
    """
    if len(size) != 2 or min(size) < 8 or seed < 0 or index < 0:
        raise DataError(
            f"size = {size}, seed = {seed}, index = {index}: expected sides of at least 8 and no negatives."
        )
    random = np.random.Generator(np.random.PCG64([seed, index]))
    height, width = size
    room = np.array([random.uniform(3, 6), random.uniform(2.4, 3), random.uniform(3.5, 7)], dtype=np.float32)
    view, rotation = _camera(random, room, height, width)
    _walls(view, random, room)
    _furnish(view, random, room)
    image = _shade(view, random, room).reshape(3, height, width)
    grid = (height, width)
    semantic, thing = view.label.reshape(grid), view.thing.reshape(grid)
    unseen = semantic == _ID["window"]
    depth = np.where(unseen, np.float32(0), view.near.reshape(grid))
    normal = np.where(unseen, np.float32(0), (rotation.T @ view.normal).reshape(3, *grid))
    parts = view.part.reshape(grid)
    if not (semantic == _ID["person"]).any():
        parts = np.full_like(parts, 255)
    return Room(image, semantic, depth, normal, _edges(thing), _salient(thing, semantic, depth), parts)


def _camera(random: np.random.Generator, room: Floats, height: int, width: int) -> tuple[_View, Floats]:
    """Rays of a camera that stands near one wall and looks at the opposite one."""
    eye = np.array([random.uniform(0.3, 0.7) * room[0], -random.uniform(1.2, 1.7), 0.15], dtype=np.float32)
    yaw, pitch = random.uniform(-0.35, 0.35), random.uniform(-0.2, 0.05)
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]) @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    rotation = turn.astype(np.float32)
    spread = np.float32(0.75)  # half of the vertical opening, as a tangent
    y, x = np.meshgrid(
        (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / (height / 2) * spread,
        (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / (height / 2) * spread,
        indexing="ij",
    )
    rays = rotation @ np.stack([x.ravel(), y.ravel(), np.ones(height * width, dtype=np.float32)])
    rays = np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)
    n = rays.shape[1]
    view = _View(
        origin=eye,
        rays=rays,
        near=np.full(n, np.inf, dtype=np.float32),
        thing=np.zeros(n, dtype=np.int16),
        label=np.zeros(n, dtype=np.int8),
        part=np.zeros(n, dtype=np.uint8),
        normal=np.zeros((3, n), dtype=np.float32),
        texture=np.zeros((2, n), dtype=np.float32),
    )
    view.tints.append(np.ones(3, dtype=np.float32))
    return view, rotation


def _walls(view: _View, random: np.random.Generator, room: Floats) -> None:
    """Floor (y = 0), ceiling (y = -height) and four walls; on them a rug, pictures, windows and doors."""
    far = np.array([room[0], 0, room[2]], dtype=np.float32)
    low = np.array([0, -room[1], 0], dtype=np.float32)
    bound = np.where(view.rays > 0, far[:, None], low[:, None])
    t = (bound - view.origin[:, None]) / view.rays
    axis = t.argmin(0)
    everything = np.arange(view.rays.shape[1])
    for k, names in enumerate((("wall", "wall"), ("ceiling", "floor"), ("wall", "wall"))):
        for side, name in enumerate(names):
            at = everything[(axis == k) & ((view.rays[k] > 0) == bool(side))]
            view.begin(_tint(random, 0.12))
            if len(at) == 0:
                continue
            others = [i for i in range(3) if i != k]
            point = view.origin[others, None] + view.rays[others][:, at] * t[k, at]
            normal = np.zeros((3, len(at)), dtype=np.float32)
            normal[k] = -1 if side else 1
            view.hit(at, t[k, at], _ID[name], normal, point)
            if name == "floor" and random.random() < 0.6:
                _paste(view, random, at, t[k, at], normal, point, "rug", room[[0, 2]])
            elif k != 1:
                horizontal = 0 if k == 2 else 1
                flat = point if horizontal == 0 else point[::-1]
                for kind in _decoration(random):
                    _paste(view, random, at, t[k, at], normal, flat, kind, room[[2, 0][horizontal == 0]])


def _decoration(random: np.random.Generator) -> tuple[str, ...]:
    return (("picture",), ("window",), ("door",), ("picture", "door"), ())[random.integers(5)]


def _paste(
    view: _View,
    random: np.random.Generator,
    at: NDArray[np.intp],
    t: Floats,
    normal: Floats,
    point: Floats,
    kind: str,
    extent: Floats | float,
) -> None:
    """A rectangle on a surface whose points are (along, up): drawn over what is there."""
    if kind == "rug":
        sides = np.asarray(extent)
        center = sides * random.uniform(0.3, 0.7, 2)
        half = sides * random.uniform(0.12, 0.25, 2)
    else:
        along = float(np.max(extent))
        center = np.array([along * random.uniform(0.2, 0.8), {"door": -1.0}.get(kind, -1.55)])
        usual = {"picture": (0.35, 0.28), "window": (0.6, 0.5), "door": (0.45, 1.0)}[kind]
        half = np.array(usual) * random.uniform(0.8, 1.2, 2)
        half[1] = 1.0 if kind == "door" else half[1]
    offset = np.abs(point - center[:, None].astype(np.float32))
    inside = (offset < half[:, None]).all(0)
    view.begin(_tint(random, 0.3))
    view.hit(at[inside], t[inside] * np.float32(0.9999), _ID[kind], normal[:, inside], point[:, inside])
    if kind == "picture":
        frame = inside & (offset > half[:, None] - 0.05).any(0)
        view.label[at[frame & (view.thing[at] == view.things)]] = -1


def _furnish(view: _View, random: np.random.Generator, room: Floats) -> None:
    """Furniture, balls, a lamp, and in half of the rooms a person."""
    sizes = {"cabinet": (0.5, 0.9, 0.3), "table": (0.6, 0.38, 0.4), "bed": (0.8, 0.25, 1.0)}
    for _ in range(random.integers(2, 5)):
        kind = ("cabinet", "table", "bed")[random.integers(3)]
        half = np.array(sizes[kind]) * random.uniform(0.75, 1.25, 3)
        _box(view, random, kind, _place(random, room, half), half, float(random.uniform(-np.pi, np.pi)))
    for _ in range(random.integers(0, 3)):
        radius = random.uniform(0.12, 0.35)
        x, z = random.uniform(0.15, 0.85, 2) * room[[0, 2]]
        _sphere(view, random, "ball", np.array([x, -radius, max(z, 1.5)]), radius)
    if random.random() < 0.5:
        x, z = random.uniform(0.2, 0.8, 2) * room[[0, 2]]
        _sphere(view, random, "lamp", np.array([x, -room[1] + 0.35, max(z, 1.5)]), random.uniform(0.12, 0.22))
    if random.random() < 0.5:
        _person(view, random, room)


def _place(random: np.random.Generator, room: Floats, half: NDArray[np.float64]) -> NDArray[np.float64]:
    x, z = random.uniform(0.1, 0.9) * room[0], random.uniform(0.35, 0.95) * room[2]
    return np.array([x, -half[1], max(z, 1.2 + half[2])])


def _person(view: _View, random: np.random.Generator, room: Floats) -> None:
    """A standing person of boxes and a sphere, one thing with six parts."""
    x, z = random.uniform(0.25, 0.75) * room[0], max(random.uniform(0.35, 0.8) * room[2], 1.6)
    scale, angle = random.uniform(0.85, 1.1), float(random.uniform(-np.pi, np.pi))
    swing = random.uniform(-0.15, 0.15, 4)
    view.begin(_tint(random, 0.2))
    cos, sin = np.cos(angle), np.sin(angle)

    def limb(part: int, right: float, up: float, ahead: float, half: tuple[float, float, float]) -> None:
        center = np.array(
            [x + scale * (cos * right + sin * ahead), -scale * up, z + scale * (cos * ahead - sin * right)]
        )
        _box(view, random, "person", center, scale * np.array(half), angle, part=part)

    limb(2, 0, 1.15, 0, (0.20, 0.30, 0.12))
    for i, side in enumerate((-1, 1)):
        limb(3, side * 0.26, 1.27, 0.5 * swing[i], (0.06, 0.17, 0.06))
        limb(4, side * 0.28, 0.95, swing[i], (0.05, 0.16, 0.05))
        limb(5, side * 0.10, 0.64, 0.5 * swing[2 + i], (0.08, 0.22, 0.08))
        limb(6, side * 0.10, 0.21, swing[2 + i], (0.07, 0.21, 0.07))
    _sphere(view, random, "person", np.array([x, -scale * 1.60, z]), scale * 0.14, part=1)


def _tint(random: np.random.Generator, spread: float) -> Floats:
    return random.uniform(1 - spread, 1 + spread, 3).astype(np.float32)


def _near_sphere(view: _View, center: Floats, radius: float) -> NDArray[np.intp]:
    """Rays that pass a ball around something closer than its radius; the others cannot meet the thing."""
    offset = center - view.origin
    along = offset @ view.rays
    squared = (view.rays * view.rays).sum(0)
    found: NDArray[np.intp] = np.flatnonzero(
        (along > 0) & (offset @ offset - along * along / squared < radius * radius)
    )
    return found


def _box(
    view: _View,
    random: np.random.Generator,
    kind: str,
    center: NDArray[np.float64],
    half: NDArray[np.float64],
    angle: float,
    *,
    part: int = 0,
) -> None:
    """A box turned about the vertical."""
    if not part:
        view.begin(_tint(random, 0.3))
    middle, sides = center.astype(np.float32), half.astype(np.float32)
    at = _near_sphere(view, middle, float(np.linalg.norm(sides)))
    if len(at) == 0:
        return
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], dtype=np.float32)
    rays, start = turn @ view.rays[:, at], turn @ (view.origin - middle)
    rays = np.where(np.abs(rays) < 1e-7, np.float32(1e-7), rays)
    inner, outer = (
        (-sides[:, None] * np.sign(rays) - start[:, None]) / rays,
        (sides[:, None] * np.sign(rays) - start[:, None]) / rays,
    )
    t = inner.max(0)
    meets = (t < outer.min(0)) & (t > 0.05)
    at, t, rays, face = at[meets], t[meets], rays[:, meets], inner[:, meets].argmax(0)
    normal = np.zeros_like(rays)
    normal[face, np.arange(len(at))] = -np.sign(rays[face, np.arange(len(at))])
    point = start[:, None] + rays * t
    texture = np.stack([np.where(face == 0, point[2], point[0]), np.where(face == 1, point[2], point[1])])
    view.hit(at, t, _ID[kind], turn.T @ normal, texture, part=part)


def _sphere(
    view: _View, random: np.random.Generator, kind: str, center: NDArray[np.float64], radius: float, *, part: int = 0
) -> None:
    """A ball."""
    if not part:
        view.begin(_tint(random, 0.3))
    middle = center.astype(np.float32)
    at = _near_sphere(view, middle, radius)
    rays, offset = view.rays[:, at], view.origin - middle
    a, b = (rays * rays).sum(0), offset @ rays
    root = b * b - a * np.float32(offset @ offset - radius * radius)
    meets = root > 0
    at, rays = at[meets], rays[:, meets]
    t = (-b[meets] - np.sqrt(root[meets])) / a[meets]
    ahead = t > 0.05
    at, t, rays = at[ahead], t[ahead], rays[:, ahead]
    normal = (offset[:, None] + rays * t) / np.float32(radius)
    angles = np.stack([np.arctan2(normal[0], normal[2]), np.arcsin(np.clip(normal[1], -1, 1))]) * np.float32(radius)
    view.hit(at, t, _ID[kind], normal, angles, part=part)


def _shade(view: _View, random: np.random.Generator, room: Floats) -> Bytes:
    """Colours [3, N] uint8: class and thing, a pattern, one light, a little noise."""
    color = _COLORS[view.label].T * np.stack(view.tints)[view.thing].T
    scale = np.array([3.0, 1.0, 0.5, 4.0, 3.0, 6.0, 8.0, 1.0, 9.0, 1.5, 2.0, 12.0, 7.0], dtype=np.float32)[view.label]
    u, v = view.texture * scale
    checks = ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    stripes = np.sin(2 * np.pi * u)
    color = color * (1 + np.where(view.label % 2 == 0, 0.12 * (checks - 0.5) * 2, 0.10 * stripes))
    light = np.array(
        [room[0] * random.uniform(0.2, 0.8), -room[1] + 0.1, room[2] * random.uniform(0.2, 0.6)], np.float32
    )
    towards = light[:, None] - (view.origin[:, None] + view.rays * view.near)
    distance = np.sqrt((towards * towards).sum(0)) + np.float32(1e-3)
    facing = np.maximum((towards * view.normal).sum(0) / distance, 0)
    brightness = 0.45 + 0.9 * facing / (1 + 0.06 * distance * distance)
    brightness = np.where((view.label == _ID["lamp"]) | (view.label == _ID["window"]), 1.25, brightness)
    noise = random.standard_normal(color.shape[1], dtype=np.float32) * np.float32(0.02)
    drawn: Bytes = np.clip((color * brightness + noise) * random.uniform(0.8, 1.15) * 255, 0, 255).astype(np.uint8)
    return drawn


def _edges(thing: NDArray[np.int16]) -> Bytes:
    """1 where the pixel to the right or below shows another thing."""
    edge = np.zeros(thing.shape, dtype=np.uint8)
    edge[:, :-1] |= thing[:, :-1] != thing[:, 1:]
    edge[:-1] |= thing[:-1] != thing[1:]
    return edge


def _salient(thing: NDArray[np.int16], semantic: NDArray[np.int8], depth: Floats) -> Bytes:
    """1 on the nearest of the movable things that cover at least a hundredth of the image."""
    movable = np.isin(semantic, [_ID[n] for n in ("cabinet", "table", "bed", "ball", "lamp", "person")])
    if not movable.any():
        return np.zeros(thing.shape, dtype=np.uint8)
    count = np.bincount(thing[movable])
    total = np.bincount(thing[movable], weights=depth[movable])
    large = count * 100 >= thing.size
    if not large.any():
        return np.zeros(thing.shape, dtype=np.uint8)
    nearest = int(np.where(large, total / np.maximum(count, 1), np.inf).argmin())
    chosen: Bytes = (thing == nearest).astype(np.uint8)
    return chosen
