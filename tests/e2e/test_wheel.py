"""What is installed: a wheel holds every file that the library reads, the paper's tables among them."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

from reconmtl.paper.published import TITLES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "reconmtl"
READ = {f"paper/data/{name}.csv" for name in (*TITLES, "text")} | {
    "reporting/page.css",
    "reporting/page.js",
    "py.typed",
}


def others() -> set[str]:
    """Files of the package that are no Python."""
    found = (p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))
    return {p.relative_to(PACKAGE).as_posix() for p in found}


def test_the_build_takes_the_whole_package_and_nothing_hides_a_file_from_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["build-system"]["build-backend"] == "hatchling.build"
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/reconmtl"]}  # all that is in it, unless version control ignores it
    assert not {"exclude", "include", "only-include"} & set(settings["tool"]["hatch"]["build"])
    assert others() >= READ
    for name in READ:
        assert files("reconmtl").joinpath(*name.split("/")).is_file(), name
    if (ROOT / ".git").exists() and shutil.which("git"):
        paths = [str(PACKAGE / name) for name in sorted(READ)]
        ignored = subprocess.run(["git", "check-ignore", "--", *paths], cwd=ROOT, capture_output=True, text=True)
        assert ignored.stdout == ""


@pytest.mark.slow
def test_a_built_wheel_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert inside >= {f"reconmtl/{name}" for name in READ}
    assert inside >= {f"reconmtl/{p.relative_to(PACKAGE).as_posix()}" for p in PACKAGE.rglob("*.py")}
