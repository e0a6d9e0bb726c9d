"""QM9 from the package qm9pack: 130,831 molecules with geometry and 11 targets, parsed once into arrays.

The package itself is never imported (it needs modules that newer environments lack); its CSV files are read. Energies
of molecules are atomisation energies, as in the field's multi-task benchmark: the molecule's minus those of its atoms.

Reference: Ramakrishnan et al., Quantum chemistry structures and properties of 134 kilo molecules, Scientific Data 2014.
"""

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from reconmtl.errors import DataError, missing_extra
from reconmtl.files import cache_folder, write_bytes
from reconmtl.progress import bar

PARTS = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
COUNT = 130_831
ELEMENTS = ("H", "C", "N", "O", "F")
NUMBERS = (1, 6, 7, 8, 9)
RADII = (0.31, 0.76, 0.71, 0.66, 0.57)
"""Covalent radii of the elements [angstrom] (Cordero et al., Dalton Transactions 2008)."""
HARTREE = 27_211.386246
"""One hartree [meV]."""
FORMAT = "reconmtl.qm9/1"


@dataclass(frozen=True)
class Target:
    """One of QM9's properties.

    Attributes:
        column: In the package's files.
        unit: That the field reports errors in.
        factor: From the files' unit to that one.
        atoms: What the elements' free atoms have [the files' unit]; zeros where nothing is subtracted.
    """

    column: str
    unit: str
    factor: float = 1.0
    atoms: tuple[float, ...] = (0.0,) * len(ELEMENTS)


TARGETS = {
    "mu": Target("Dipole_debye", "D"),
    "alpha": Target("Polarizability_bohr3", "a0^3"),
    "homo": Target("HOMO_au", "meV", HARTREE),
    "lumo": Target("LUMO_au", "meV", HARTREE),
    "r2": Target("R2_bohr2", "a0^2"),
    "zpve": Target("ZPVE_au", "meV", HARTREE),
    "u0": Target("InternalEnergy_0K_au", "meV", HARTREE, (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730)),
    "u": Target("InternalEnergy_298K_au", "meV", HARTREE, (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314)),
    "h": Target("Enthalphy_298K_au", "meV", HARTREE, (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370)),
    "g": Target("GibbsFreeEnergy_298K_au", "meV", HARTREE, (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544)),
    "cv": Target("Heatcapacity_Cv_cal_mol_K", "cal/(mol K)"),
}
"""The 11 targets of the field's benchmark, in its order; the gap of homo and lumo is left out, as there."""


@dataclass(frozen=True)
class Molecules:
    """Molecules as arrays; the atoms of molecule i are `start[i]` to `start[i + 1]`.

    Attributes:
        start: [N + 1] int64.
        elements: [atoms] uint8, positions in `ELEMENTS`.
        positions: [atoms, 3] float32 [angstrom].
        targets: [N, 11] float64, in the order and units of `TARGETS`.
    """

    start: NDArray[np.int64]
    elements: NDArray[np.uint8]
    positions: NDArray[np.float32]
    targets: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.targets)


def parse(files: Sequence[Path]) -> Molecules:
    """Read the package's CSV files.

    Raises:
        DataError: If a file is missing, or a line is not as published; it is named.
    """
    counts, elements, positions, targets = [0], [], [], []
    factors = np.array([t.factor for t in TARGETS.values()])
    atoms = np.array([t.atoms for t in TARGETS.values()])
    code = {name: i for i, name in enumerate(ELEMENTS)}
    with bar(COUNT, "reading QM9", "molecule") as progress:
        for path in files:
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    for line, row in enumerate(csv.DictReader(file), start=2):
                        try:
                            kinds = [code[e] for e in row["Elements"].strip("[]").replace("'", "").split(",")]
                            flat = row["XYZ_Ang"].replace("*^", "e").replace("[", "").replace("]", "").split(",")
                            place = np.array(flat, dtype=np.float32).reshape(len(kinds), 3)
                            values = np.array([row[t.column].replace("*^", "e") for t in TARGETS.values()], dtype=float)
                        except (KeyError, ValueError, AttributeError, TypeError) as error:
                            raise DataError(f"{path}, line {line}: no molecule of QM9 ({error!r}).") from None
                        values -= atoms[:, kinds].sum(1)
                        if not (np.isfinite(values).all() and np.isfinite(place).all()):
                            raise DataError(f"{path}, line {line}: NaN or infinite values.")
                        counts.append(len(kinds))
                        elements += kinds
                        positions.append(place)
                        targets.append(values * factors)
                        progress.update()
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
    if not targets:
        raise DataError(f"No molecules in {', '.join(str(p) for p in files)}.")
    return Molecules(
        np.cumsum(counts, dtype=np.int64),
        np.array(elements, dtype=np.uint8),
        np.concatenate(positions),
        np.stack(targets),
    )


def load(cache: Path | None = None) -> Molecules:
    """All molecules: parsed on the first call (half a minute), read from a cache of 35 MB ever after.

    Args:
        cache: Where the arrays are kept; None: the platform's cache folder.

    Raises:
        MissingExtraError: If qm9pack is not installed and there is no cache.
        DataError: If its files, or the cache, are damaged.
    """
    path = (cache or cache_folder()) / "qm9" / "molecules.safetensors"
    if not path.exists():
        found = importlib.util.find_spec("qm9pack")
        if found is None or found.origin is None:
            raise missing_extra("QM9", "qm9")
        molecules = parse([Path(found.origin).parent / "data" / name for name in PARTS])
        if len(molecules) != COUNT:
            raise DataError(f"qm9pack holds {len(molecules):,} molecules, expected {COUNT:,}: install it again.")
        write_bytes(path, partial(_write, vars(molecules)))
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 it is no mapping
            form = (file.metadata() or {}).get("format")
        molecules = Molecules(**arrays)
        ends = molecules.start[-1] == len(molecules.elements) == len(molecules.positions)
        sound = form == FORMAT and ends and len(molecules.start) == len(molecules) + 1 == COUNT + 1
    except (OSError, safetensors.SafetensorError, TypeError, IndexError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged: delete it, and QM9 is parsed again.")
    return molecules


def _write(arrays: dict[str, NDArray[Any]], path: Path) -> None:
    safetensors.numpy.save_file(arrays, path, metadata={"format": FORMAT})


Graphs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Atoms [A, 8], pairs of atoms [2, P], what is known of each pair [P, 2], and the molecule of each atom [A]."""


class QM9:
    """Some of the molecules; items are (`Graphs` of one molecule, {target: standardised value}).

    Every molecule is a complete graph. Atoms: one-hot element, atomic number, number of neighbours and of hydrogens
    among them; pairs: whether they are bonded (nearer than 1.25 times the sum of their covalent radii), their distance.

    Args:
        molecules: All of them.
        indices: Which of them, [n].
        mean: Of the targets, [11].
        std: Of the targets, [11]; a target is (value - mean) / std.
        tasks: Some of the targets.
        fingerprint: Names the data.
    """

    def __init__(
        self,
        molecules: Molecules,
        indices: NDArray[np.int64],
        *,
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
        tasks: Sequence[str],
        fingerprint: str,
    ) -> None:
        self.molecules, self.indices, self.tasks, self.fingerprint = molecules, indices, tuple(tasks), fingerprint
        columns = [list(TARGETS).index(t) for t in self.tasks]
        values = (molecules.targets[indices] - mean) / std
        self.values = torch.from_numpy(values[:, columns].astype(np.float32))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Graphs, dict[str, Tensor]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} molecules, no number {index}.")
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs, {t: y[0] for t, y in targets.items()}

    def batch(self, indices: Tensor) -> tuple[Graphs, dict[str, Tensor]]:
        """Molecules at `indices` [n] as one graph without connections between them, and a target [n] per task."""
        at = self.indices[indices.numpy()]
        start, stop = self.molecules.start[at], self.molecules.start[at + 1]
        sizes = stop - start
        atoms = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)])
        owner = np.repeat(np.arange(len(at)), sizes)
        # All ordered pairs of different atoms of one molecule, molecule by molecule.
        first = np.repeat(np.arange(len(atoms)), sizes[owner])
        offset = np.cumsum(sizes) - sizes
        within = np.arange(len(first)) - np.repeat(np.cumsum(sizes[owner]) - sizes[owner], sizes[owner])
        second = offset[owner[first]] + within
        pairs = np.stack([first, second])[:, first != second]
        kinds, places = self.molecules.elements[atoms], self.molecules.positions[atoms]
        apart = np.linalg.norm(places[pairs[0]] - places[pairs[1]], axis=1)
        radii = np.array(RADII, dtype=np.float32)[kinds]
        bonded = apart < 1.25 * (radii[pairs[0]] + radii[pairs[1]])
        neighbours = np.bincount(pairs[1], weights=bonded, minlength=len(atoms))
        hydrogens = np.bincount(pairs[1], weights=bonded & (kinds[pairs[0]] == 0), minlength=len(atoms))
        known = [np.eye(len(ELEMENTS))[kinds], np.array(NUMBERS)[kinds], neighbours, hydrogens]
        features = np.column_stack(known).astype(np.float32)
        edges = np.column_stack([bonded, apart]).astype(np.float32)
        graphs = (torch.from_numpy(features), torch.from_numpy(pairs), torch.from_numpy(edges), torch.from_numpy(owner))
        return graphs, dict(zip(self.tasks, self.values[indices].unbind(1), strict=True))
