"""Figures for papers: the files are there, whatever the names are; without matplotlib it is said at once."""

import importlib.util
import sys
from pathlib import Path

import pytest

from reconmtl.errors import RunError
from reconmtl.reporting import report
from studies import network_names, write_study

NAMES = {"methods", "plan", "conflicts", "pairs", "scores", "cosines", "training", "chance", "stability"}


@pytest.mark.slow
def test_every_plot_is_written_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = [*network_names(4), "a$b$ <script>\x07", "very.long.name." * 8]
    write_study(tmp_path / "s", tasks=["x$", "<y>", "z"], layers=layers, steps=12)
    report(tmp_path / "s", to=tmp_path / "r.html", figures=tmp_path / "figures")
    files = {f.name: f.read_bytes()[:8] for f in (tmp_path / "figures").iterdir()}
    assert set(files) == {f"{n}.{kind}" for n in NAMES for kind in ("pdf", "png")}
    assert all(head.startswith(b"%PDF-1" if n.endswith("pdf") else b"\x89PNG\r\n\x1a\n") for n, head in files.items())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_only_what_there_is_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(3), steps=1)
    report(tmp_path / "s" / "log", to=tmp_path / "r.html", figures=tmp_path / "figures")
    assert {f.stem for f in (tmp_path / "figures").iterdir()} == {"plan", "conflicts"}


def test_without_matplotlib_the_way_to_install_it_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r'pip install "reconmtl\[figures\]"'):
        report(tmp_path / "nowhere", to=tmp_path / "r.html", figures=tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []
