"""The paper's model sizes (#P), from the networks themselves: nothing is allocated, only counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import nn

from reconmtl.layers import Layer, find_layers
from reconmtl.networks import mobilenet_raspp, mtan, resnet, segnet
from reconmtl.networks.cross_stitch import CrossStitch
from reconmtl.networks.mmoe import mmoe
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.paper.published import JOINT, SINGLE, load

MEGABYTE = 2**20
Make = Callable[..., nn.Module]


@dataclass(frozen=True)
class Network:
    """One of the paper's networks.

    Attributes:
        make: `make(tasks=[...])`.
        tasks: Names of its tasks.
        unused: Parameters per network that the published code owns, counts and never uses; ours leave them out.
    """

    make: Make
    tasks: tuple[str, ...]
    unused: int = 0


NETWORKS: Mapping[str, Network] = {
    "multifashion": Network(resnet.multifashion, ("digit", "fashion")),
    "celeba": Network(resnet.celeba, tuple(CELEBA_ATTRIBUTES)),
    "segnet cityscapes": Network(segnet.cityscapes, tuple(segnet.CITYSCAPES), unused=3),
    "segnet nyuv2": Network(segnet.nyuv2, tuple(segnet.NYUV2), unused=3),
    "mtan cityscapes": Network(mtan.cityscapes, tuple(segnet.CITYSCAPES)),
    "mtan nyuv2": Network(mtan.nyuv2, tuple(segnet.NYUV2)),
    "pascal_context": Network(mobilenet_raspp.pascal_context, tuple(mobilenet_raspp.PASCAL_CONTEXT)),
}


def count(make: Make, tasks: Iterable[str]) -> int:
    """Parameters of a network for some tasks."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(tasks=list(tasks)).parameters())


@dataclass(frozen=True)
class Size:
    """Parameters of a network.

    Attributes:
        joint: Of one network for all tasks.
        single: Of one network per task together; also of the joint network with every shared layer split.
        shared: Of what all tasks share, one copy.
        tasks: How many.
    """

    joint: int
    single: int
    shared: int
    tasks: int


@cache
def size(name: str) -> Size:
    """Parameters of one of `NETWORKS`.

    Example:
        >>> round(size("multifashion").joint * 4 / 2**20, 2)
        42.81
    """
    network = NETWORKS[name]
    joint = count(network.make, network.tasks)
    single = sum(count(network.make, [t]) for t in network.tasks)
    # T single-task networks hold what is shared T times, the joint one holds it once
    shared = (single - joint) // (len(network.tasks) - 1)
    n = len(network.tasks)
    return Size(joint + network.unused, single + n * network.unused, shared, n)


def megabytes(parameters: float) -> float:
    """As fp32, in units of 2**20 bytes."""
    return parameters * 4 / MEGABYTE


def shared_layers(name: str) -> list[Layer]:
    """The shared layers of a network without modules per task but its heads, in network order."""
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.make(tasks=list(network.tasks))
    return [layer for layer in find_layers(model) if not layer.name.startswith("heads.")]


def found_by_recon(name: str) -> list[Layer]:
    """The 25 layers of ResNet18 that the published ranking puts first: all BatchNorms, the stem, the first group.

    They are told by the printed sizes too: no other rule of a sentence gives 43.43 and 68.03 MB.
    """
    return [
        layer
        for layer in shared_layers(name)
        if layer.type == "BatchNorm2d"
        or layer.name == "conv1"
        or (layer.name.startswith("layer1.") and layer.type == "Conv2d")
    ]


def split_size(name: str, chosen: Iterable[Layer]) -> int:
    """Parameters of a network once some shared layers have a copy per task."""
    found = size(name)
    return found.joint + (found.tasks - 1) * sum(layer.numel for layer in chosen)


def random_layers(seed: int, k: int = 25) -> list[Layer]:
    """The paper's RSL: the first K of the seed's permutation of ResNet18's layers."""
    layers = shared_layers("multifashion")
    return [layers[i] for i in np.random.RandomState(seed).permutation(len(layers))[:k]]


def random_parameters(seed: int) -> list[Layer]:
    """The paper's RSP: layers of the same permutation until they exceed the parameters that Recon splits."""
    layers = shared_layers("multifashion")
    order = [layers[i] for i in np.random.RandomState(seed).permutation(len(layers))]
    budget = sum(layer.numel for layer in found_by_recon("multifashion"))
    total = list(accumulate(layer.numel for layer in order))
    return order[: next(i for i, t in enumerate(total) if t > budget) + 1]


@dataclass(frozen=True)
class PrintedSize:
    """A printed #P and what it is computed from.

    Attributes:
        table: Where it is printed.
        method: Of the row.
        printed: In megabytes.
        counted: Parameters of our network.
        how: What was counted.
    """

    table: str
    method: str
    printed: float
    counted: int
    how: str

    @property
    def agrees(self) -> bool:
        """Whether it rounds to the printed number (or is cut off to it)."""
        return abs(megabytes(self.counted) - self.printed) <= 0.0101


@cache
def printed_sizes() -> tuple[PrintedSize, ...]:
    """Every printed #P that follows from a network that we have."""

    def cell(table: str, method: str) -> float:
        return next(float(r["megabytes"]) for r in load(table).dicts() if r["method"] == method)

    found = []

    def add(table: str, method: str, counted: int, how: str) -> None:
        found.append(PrintedSize(table, method, cell(table, method), counted, how))

    of = {"t1": "multifashion", "t2": "celeba", "t3": "segnet cityscapes", "t4": "pascal_context"}
    of |= {"t5": "mtan nyuv2", "t15": "segnet nyuv2", "t16": "mtan cityscapes"}
    for table, name in of.items():
        add(table, JOINT, size(name).joint, f"{name}, joint")
        add(table, SINGLE, size(name).single, f"{name}, a network per task")
    for table in ("t1", "t2"):
        chosen = found_by_recon(of[table])
        add(table, f"{JOINT} w/ Recon", split_size(of[table], chosen), f"{len(chosen)} layers split")
    everything_but_stem = [x for x in shared_layers("multifashion") if x.name not in ("conv1", "bn1")]
    add("t1", "BMTAS", split_size("multifashion", everything_but_stem), "all but the stem split")
    with torch.device("meta"):
        experts = mmoe(resnet.multifashion, torch.zeros(1, 1, 36, 36))
        two = CrossStitch(lambda task: segnet.cityscapes(tasks=[task]), segnet.CITYSCAPES)
        three = CrossStitch(lambda task: segnet.nyuv2(tasks=[task]), segnet.NYUV2)
        add("t1", "MMoE", _total(experts), "two experts")
        add("t3", "Cross-Stitch", _total(two), "two SegNets, stitched")
        add("t5", "Cross-Stitch", _total(three), "three SegNets (not MTANs), stitched")
    add("t1", "RotoGrad", size("multifashion").joint + 2 * 100**2, "joint and two 100 x 100 rotations (B.1)")
    add("t3", "RotoGrad", size("segnet cityscapes").joint + 2 * 1024**2, "joint and two 1024 x 1024 rotations")
    for selection, pick in (("RSL", random_layers), ("RSP", random_parameters)):
        for seed in range(3):
            printed = next(
                float(r["megabytes"])
                for r in load("t7").dicts()
                if r["selection"] == selection and r["seed"] == str(seed)
            )
            layers = pick(seed)
            counted = split_size("multifashion", layers)
            found.append(PrintedSize("t7", f"{selection}, seed {seed}", printed, counted, f"{len(layers)} layers"))
    layers = shared_layers("multifashion")
    for selection, part in (("first", layers[:25]), ("last", layers[-25:])):
        printed = next(float(r["megabytes"]) for r in load("t11").dicts() if r["selection"] == selection)
        found.append(PrintedSize("t11", selection, printed, split_size("multifashion", part), f"{selection} 25 layers"))
    return tuple(found)


def _total(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
