"""QM9 as data: what is read from the package's files, refused, and made of molecules."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from reconmtl.errors import DataError
from reconmtl.problems.qm9_data import ELEMENTS, HARTREE, QM9, TARGETS, Molecules, load, parse

METHANE = {
    "Elements": "['C','H','H','H','H']",
    "XYZ_Ang": "[[-0.0126981359,1.0858041578,0.0080009958],[0.002150416,-0.0060313176,0.0019761204],"
    "[1.0117308433,1.4637511618,0.0002765748],[-0.540815069,1.4475266138,-0.8766437152],"
    "[-0.5238136345,1.4379326443,9.063972943*^-1]]",
    "Dipole_debye": "0.",
    "Polarizability_bohr3": "13.21",
    "HOMO_au": "-0.3877",
    "LUMO_au": "0.1171",
    "R2_bohr2": "35.3641",
    "ZPVE_au": "0.044749",
    "InternalEnergy_0K_au": "-40.47893",
    "InternalEnergy_298K_au": "-40.476062",
    "Enthalphy_298K_au": "-40.475117",
    "GibbsFreeEnergy_298K_au": "-40.498597",
    "Heatcapacity_Cv_cal_mol_K": "6.469",
}
"""As it is published: QM9's first molecule."""
WATER = METHANE | {"Elements": "['O','H','H']", "XYZ_Ang": "[[0.,0.,0.1],[0.,0.76,-0.5],[0.,-0.76,-0.5]]"}


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, list(METHANE), quoting=csv.QUOTE_NONNUMERIC)
        lines.writeheader()
        lines.writerows(rows)
    return path


def molecules(tmp_path: Path) -> Molecules:
    return parse([write(tmp_path / "a.csv", METHANE), write(tmp_path / "b.csv", WATER)])


def test_a_published_molecule_in_the_fields_units(tmp_path: Path) -> None:
    found = molecules(tmp_path)
    assert len(found) == 2
    assert found.start.tolist() == [0, 5, 8]
    assert [ELEMENTS[e] for e in found.elements] == ["C", "H", "H", "H", "H", "O", "H", "H"]
    assert found.positions[4, 2] == pytest.approx(0.9063972943)
    values = dict(zip(TARGETS, found.targets[0], strict=True))
    assert values["homo"] == pytest.approx(-10_549.85, abs=0.01)  # meV
    # Atomisation energy of methane at 0 K: -395.999 kcal/mol in QM9's own table, -17.1722 eV.
    assert values["u0"] == pytest.approx(-17_172.2, abs=0.2)
    assert values["u0"] == pytest.approx((-40.47893 + 37.846772 + 4 * 0.500273) * HARTREE)
    assert values["cv"] == 6.469
    assert len(TARGETS) == 11


def test_graphs_equal_a_slow_construction(tmp_path: Path) -> None:
    all_of_them = molecules(tmp_path)
    data = QM9(
        all_of_them, np.array([1, 0, 1]), mean=np.zeros(11), std=np.full(11, 2.0), tasks=["cv", "mu"], fingerprint="x"
    )
    (atoms, pairs, known, owner), targets = data.batch(torch.tensor([0, 1]))
    assert list(targets) == ["cv", "mu"]
    assert targets["cv"].tolist() == pytest.approx([6.469 / 2] * 2)
    assert owner.tolist() == [0] * 3 + [1] * 5
    expected = {(i, j) for i in range(8) for j in range(8) if i != j and (i < 3) == (j < 3)}
    assert set(map(tuple, pairs.T.tolist())) == expected
    assert len(expected) == pairs.shape[1]
    places = np.concatenate([all_of_them.positions[5:], all_of_them.positions[:5]])
    for (i, j), (bonded, apart) in zip(pairs.T.tolist(), known.tolist(), strict=True):
        assert apart == pytest.approx(float(np.linalg.norm(places[i] - places[j])), abs=1e-5)
        assert bonded == float(0 in (i, j) if i < 3 else 3 in (i, j))  # oxygen and carbon are bonded to hydrogens
    assert atoms[0].tolist() == [0, 0, 0, 1, 0, 8, 2, 2]  # oxygen: two neighbours, both hydrogens
    assert atoms[3].tolist() == [0, 1, 0, 0, 0, 6, 4, 4]
    assert atoms[4].tolist() == [1, 0, 0, 0, 0, 1, 1, 0]
    one, target = data[1]
    assert one[0].shape == (5, 8)
    assert target["cv"].ndim == 0
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Elements": "['C','X']"}, "line 3: no molecule"),
        ({"XYZ_Ang": "[[1.,2.]]"}, "line 3: no molecule"),
        ({"ZPVE_au": "x"}, "line 3: no molecule"),
        ({"ZPVE_au": "nan"}, "line 3: NaN"),
    ],
)
def test_odd_lines_are_refused_by_number(change: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        parse([write(tmp_path / "a.csv", METHANE, WATER | change)])


def test_a_missing_file_and_a_damaged_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        parse([tmp_path / "none.csv"])
    (tmp_path / "qm9").mkdir()
    (tmp_path / "qm9" / "molecules.safetensors").write_bytes(b"no arrays")
    with pytest.raises(DataError, match="delete it"):
        load(tmp_path)


@pytest.mark.slow
def test_the_packages_data(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert len(found) == 130_831
    again = load(tmp_path)
    assert np.array_equal(again.targets, found.targets)
    mu, cv = found.targets[:, 0], found.targets[:, -1]
    assert mu.mean() == pytest.approx(2.67, abs=0.05)  # the field's table of QM9: 2.67 D, 31.6 cal/(mol K)
    assert cv.mean() == pytest.approx(31.6, abs=0.1)
