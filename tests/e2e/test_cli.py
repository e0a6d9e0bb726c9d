"""The real command, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reconmtl.cli import main
from reconmtl.version import __version__


def _run(*arguments: str, cwd: Path, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RECONMTL_CACHE": str(cache or cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "reconmtl", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_one_command_does_the_whole_of_recon(tmp_path: Path) -> None:
    done = _run("run", "planted", "--seeds", "0", "--out", "here", "--progress", "always", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| joint w/ Recon" in done.stdout
    assert "Results: here" in done.stdout
    assert "probe seed 0" in done.stderr  # progress is on stderr only
    assert "it/s" not in done.stdout
    assert "seed 0" not in done.stdout.partition("| method")[0]
    assert (tmp_path / "here" / "table.md").read_text().strip() in done.stdout


def test_json_on_stdout_and_nothing_on_stderr_without_a_terminal(tmp_path: Path) -> None:
    done = _run("run", "planted", "--seeds", "0", "--epochs", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in json.loads(done.stdout)["rows"]][:2] == ["single-task", "joint"]
    assert done.stderr == ""


def test_paper_scale_smoke_test_runs_without_the_full_data(tmp_path: Path) -> None:
    done = _run("run", "multifashion", "--preset", "paper", "--fast-dev-run", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for size in ("42.81", "85.62", "43.30"):  # joint and single-task as published, the 25 smallest layers
        assert f" {size} " in done.stdout
    assert "numbers mean nothing" in done.stdout
    assert "mini set instead" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["run", "multifashio"], ["Unknown problem", "Nearest: 'multifashion'"]),
        (["run", "multifashion", "--preset", "papr"], ["Unknown preset 'papr'", "Nearest: 'paper'"]),
        (["run", "multifashion", "--tasks", "digit", "fashon"], ["Unknown task 'fashon'", "Nearest: 'fashion'"]),
        (["run", "planted", "--k", "7"], ["K = 7", "from 1 to 6"]),
        (["run", "planted", "--seeds", "-1"], ["seeds = [-1]", "from 0 to 2**32 - 1"]),
        (["run", "planted", "--severity", "0.1"], ["S = 0.1", "(-1, 0]"]),
        (["run", "planted", "--severity", "-1"], ["S = -1", "(-1, 0]"]),
        (["run", "multifashion", "--preset", "paper"], ["reconmtl data multifashion --from DIR", "--download"]),
        (["run", "multifashion", "--data", "nowhere.pickle"], ["nowhere.pickle"]),
        (["data", "multifashion", "--from", "nowhere"], ["nowhere"]),
        (["data", "multifashion"], ["--from DIR"]),
        (["data", "celebra"], ["celebra"]),
        (["run", "planted", "--resume", "--overwrite"], ["one of them"]),
        (["run", "planted", "--stepz", "3"], ["--stepz"]),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(
    arguments: list[str],
    pieces: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path / "cache"))
    try:
        code: object = main(arguments)
    except SystemExit as done:  # the parser's own way out
        code = done.code
    assert code == 2
    errors = capsys.readouterr().err
    for piece in pieces:
        assert piece in errors
    assert not (tmp_path / "runs").exists()  # found out before anything was made


def test_bad_input_ends_the_process_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = _run("run", "multifashion", "--preset", "papr", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: Unknown preset 'papr' of multifashion. Nearest: 'paper'.\n"
    assert done.stdout == ""


def test_an_existing_folder_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    arguments = ("run", "planted", "--seeds", "0", "--epochs", "1", "--methods", "joint", "--out", "out")
    assert _run(*arguments, cwd=tmp_path).returncode == 0
    again = _run(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "--overwrite" in again.stderr
    assert _run(*arguments, "--resume", cwd=tmp_path).returncode == 0


def test_a_corrupt_data_file_is_named(tmp_path: Path) -> None:
    for folder in ("mnist", "fashion-mnist"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnot really")
    done = _run("data", "multifashion", "--from", "data", cwd=tmp_path)
    assert done.returncode == 2
    assert "train-images-idx3-ubyte" in done.stderr
    assert "Traceback" not in done.stderr


def test_your_own_problem_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from reconmtl.problems import planted\ndef make():\n    return planted.make().replace(name='mine')\n"
    )
    done = _run("run", "mine.py:make", "--k", "2", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "blocks.4" in done.stdout
    wrong = _run("run", "mine.py:mak", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Nearest: 'make'" in wrong.stderr


def test_an_interrupted_study_leaves_no_process_behind_and_resumes(tmp_path: Path) -> None:
    arguments = [
        "run",
        "planted",
        "--epochs",
        "2000",
        "--probe-epochs",
        "1",
        "--seeds",
        "0",
        "--jobs",
        "2",
        "--out",
        "o",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "reconmtl", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "o" / "plan.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # ends only when every process that holds the pipes has ended
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    while _alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = (tmp_path / "o" / "log" / "log.json").stat().st_mtime_ns
    done = _run(*arguments[:1], "planted", "--epochs", "2", "--out", "o", "--resume", cwd=tmp_path)
    assert done.returncode == 2  # other settings
    assert (tmp_path / "o" / "log" / "log.json").stat().st_mtime_ns == before


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_worker_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "import multiprocessing\n"
        "from reconmtl.problems import planted\n"
        "def make():\n"
        "    if multiprocessing.parent_process() is not None:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return planted.make()\n"
    )
    done = _run("run", "mine.py:make", "--k", "2", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "was killed" in done.stderr
    assert "Traceback" not in done.stderr


def test_ls_lists_the_ready_problems(tmp_path: Path) -> None:
    done = _run("ls", cwd=tmp_path)
    assert done.returncode == 0
    assert "multifashion" in done.stdout
    assert "--preset demo: width 8, data mini, 8 epochs (2 probed)" in done.stdout
    assert "--preset paper: width 64, data full, 120 epochs (30 probed), batch 256, K = 25" in done.stdout
    assert "planted" in done.stdout


def test_help_says_what_the_program_is_and_the_version_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0 and "Find the layers of a multi-task network that the tasks fight over" in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"reconmtl {__version__}\n"
