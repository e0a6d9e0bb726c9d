"""Every block of the documentation runs, in order, and prints what the page says."""

import doctest
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from reconmtl.cli import EXIT_CODES, main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(p.name for p in DOCS.glob("*.md"))


def _blocks(page: str) -> list[tuple[str, str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Board:
    """Stands for a service that a test must not depend on, and remembers what it was told."""

    def __init__(self, **said: Any) -> None:
        self.said, self.finished = said, False
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert not self.finished
        self.logged[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Board]]:
    """W&B and trackio, as far as loggers use them."""
    opened: dict[str, list[Board]] = {"wandb": [], "trackio": []}
    for name, of in opened.items():

        def init(of: list[Board] = of, **said: Any) -> Board:
            of.append(Board(**said))
            return of[-1]

        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    return opened


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own, as the next
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(
    page: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    boards: dict[str, list[Board]],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": f"docs.{page}"}
    printed = None
    with torch.random.fork_rng():
        for kind, code in _blocks(page):
            file = re.match(r"# (\w+\.\w+)\n", code)
            if file is not None:
                Path(file[1]).write_text(code)
            if file is not None and re.search(rf"^\$ torchrun .*{file[1]}$", text, re.MULTILINE):
                continue  # runs when the page starts its processes
            if kind == "python":
                exec(compile(code, page, "exec"), names)
                printed = capsys.readouterr().out
            elif kind == "text":
                assert printed == code, f"{page}: a block prints something else than the page says"
                printed = None
            elif kind == "console":
                _session(page, code, capsys)
    if page == "cli.md":
        for name, of in boards.items():
            (board,) = of
            assert board.finished and board.said["name"] == "joint seed 0" and 1 in board.logged, name
            assert "test/plus/mse" in board.logged[1]


def _session(page: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the commands after '$ ' and compare what they say with the lines that follow, as doctest does."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for command, wanted in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", code, re.MULTILINE):
        program, *words = shlex.split(command)
        if program == "torchrun":
            _together(words[-1])
            continue
        assert program == "reconmtl"
        ended = main(words)
        captured = capsys.readouterr()
        said = captured.out + captured.err + (f"[exit code {ended}]\n" if ended else "")
        assert doctest.OutputChecker().check_output(wanted, said, flags), f"{page}: {command}\n{said}"


def _together(script: str, size: int = 2) -> None:
    """What torchrun does, but for its rendezvous over the machine's name: that the tests of `torchrun` itself need."""
    code = (
        "import functools, os, runpy, sys, torch.distributed as dist\n"
        "rank, size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
        f"dist.init_process_group = functools.partial(dist.init_process_group, init_method='file://{Path.cwd()}/store',\n"
        "                                            rank=rank, world_size=size)\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "os._exit(0)\n"  # gloo's threads may still run, and abort an orderly end
    )
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, script],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    try:
        said = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(s[-3000:] for s in said)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (DOCS / page).read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), f"{page}: {target}"


def test_exit_codes_are_those_of_the_program_and_loggers_are_short() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)) == {str(c): t for c, t in EXIT_CODES.items()}
    (classes,) = (code for kind, code in _blocks("cli.md") if kind == "python")
    for example in classes.split("\n\n\n"):
        assert len([line for line in example.splitlines() if line.strip() and not line.startswith("#")]) <= 15
