import random
import subprocess
import sys
from pathlib import Path

import reconmtl as rm

SOURCE = Path(rm.__file__).parent


def test_every_public_name_exists_and_is_no_module() -> None:
    for name in rm.__all__:
        assert type(getattr(rm, name)).__name__ != "module", name
    assert sorted(rm.__all__) == rm.__all__[:]
    assert dir(rm) == rm.__all__


def test_public_names_survive_importing_every_room_in_random_order() -> None:
    rooms = [
        ".".join(("reconmtl", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in SOURCE.rglob("*.py")
        if path.name != "__main__.py"
    ]
    random.Random(0).shuffle(rooms)
    code = (
        f"import importlib\nfor room in {rooms!r}: importlib.import_module(room)\n"
        "import reconmtl as rm\n"
        "bad = [n for n in rm.__all__ if n != '__version__' and not callable(getattr(rm, n))]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=120)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, reconmtl.cli\n"
        "from reconmtl.commands import COMMANDS\n"
        "for words in (['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)):\n"
        "    assert reconmtl.cli.main(words) == 0\n"
        "    assert 'torch' not in sys.modules and 'numpy' not in sys.modules, words"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_every_source_file_has_a_test() -> None:
    tests = {p.name for p in Path(__file__).parents[1].rglob("test_*.py")}
    without = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if path.stem not in ("__init__", "__main__", "errors", "version")
        and f"test_{path.stem}.py" not in tests
        and path.parent.name != "splitting"
    ]
    assert not without
