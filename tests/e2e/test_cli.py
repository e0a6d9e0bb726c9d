"""The command line as people and machines use it; a process of its own only where one is needed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commandline import QUICK, Say, caller
from reconmtl.cli import EXIT_CODES, GROUPS, parse
from reconmtl.commands import COMMANDS
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


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    return caller(tmp_path, monkeypatch, capsys)


# Help. ----------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_exit_code_and_the_version_can_be_asked_for(say: Say) -> None:
    for words in (("--help",), ("-h",), ("help",)):
        said = say(*words)
        assert said.code == 0 and "Find the layers of a multi-task network that the tasks fight over" in said.out
        for name in COMMANDS:
            assert f"  {name:9}" in said.out
        for code, told in EXIT_CODES.items():
            assert f"{code:<5}{told}" in said.out
    assert say().code == 2  # no command at all is no success
    assert say("--version").out == f"reconmtl {__version__}\n"
    assert {name for names in GROUPS.values() for name in names} >= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_grouped_help_with_three_examples_that_can_be_parsed(name: str, say: Say) -> None:
    said = say(name, "--help")
    assert said.code == 0 and said.err == ""
    for group in COMMANDS[name].options.__bases__[1:]:
        if len(getattr(group, "__dataclass_fields__", {})) > 1:
            assert f" {group.__name__.removesuffix('Options').lower()} options " in said.out
    for option in ("--config FILE", "--json", "--quiet"):
        assert option in said.out
    examples: tuple[str, ...] = COMMANDS[name].options.examples  # type: ignore[attr-defined]
    assert len(examples) == 3
    Path("sweep.yaml").write_text("problems: [planted]\n")
    for line in examples:
        assert f"\n  {line}\n" in said.out
        command, first, *rest = shlex.split(line.partition(" | ")[0].partition(" > ")[0])
        assert (command, first) == ("reconmtl", name)
        options, faults = parse(name, rest)
        assert isinstance(options, COMMANDS[name].options) and not faults


# Options from files. --------------------------------------------------------------------------------------------------


def test_a_file_gives_options_and_the_command_line_overrides_them(say: Say) -> None:
    Path("run.yaml").write_text("problem: planted\nseeds: [3, 4]\nepochs: 2\nlr: 1e-3\nmethods: joint\nquiet: true\n")
    options, faults = parse("run", ["--config", "run.yaml", "--seeds", "5", "--no-quiet"])
    assert not faults
    assert (options.problem, options.seeds, options.epochs, options.lr) == ("planted", (5,), 2, 0.001)
    assert options.methods == ("joint",) and options.quiet is False
    assert parse("run", ["multifashion", "--config=run.yaml"])[0].problem == "multifashion"
    assert say("run", "--config", "run.yaml", "--json", "--jobs", "1").json["rows"][0]["seeds"] == [3, 4]


def test_all_faults_of_file_and_options_are_reported_at_once(say: Say) -> None:
    Path("run.yaml").write_text("problem: planted\nepochz: 3\nseeds: [a]\nmethods: [jiont]\nseverity: 0.5\n")
    said = say("run", "--config", "run.yaml", "--k", "0", "--tasks", "plus", "minsu")
    assert said.code == 2 and said.out == "" and said.err.startswith("error: ")
    for piece in (
        "run.yaml: Unknown key 'epochz'. Nearest: 'epochs'",
        "run.yaml: seeds = ['a']: expected a list, each a whole number.",
        "Unknown method 'jiont'. Nearest: 'joint'.",
        "S = 0.5 is outside (-1, 0]",
        "K = 0",
        "Nearest: 'minus'",
    ):
        assert piece in said.err
    assert not Path("runs").exists()


# Bad input. -----------------------------------------------------------------------------------------------------------


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
        (["run", "planted", "--epoch", "3"], ["Perhaps you meant", "--epochs"]),
        (["run", "planted", "--methods", "joint+recn"], ["Nearest:", "'recon'"]),
        (["run", "planted", "--config", "none.yaml"], ["no file none.yaml"]),
        (["rnu", "planted"], ["Unknown command 'rnu'. Nearest: 'run'"]),
        (["sweep"], ["problems: give at least one"]),
        (["sweep", "--problems", "plantd", "multifashio", "--k", "0"], ["'planted'", "'multifashion'", "K = 0"]),
        (["rank"], ["LOG"]),
        (["compare"], ["RUN"]),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments: list[str], pieces: list[str], say: Say) -> None:
    said = say(*arguments)
    assert said.code == 2 and said.out == ""
    for piece in pieces:
        assert piece in said.err
    assert not Path("runs").exists()  # found out before anything was made


def test_a_corrupt_data_file_is_named(say: Say) -> None:
    for folder in ("mnist", "fashion-mnist"):
        Path("data", folder).mkdir(parents=True)
    Path("data", "mnist", "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnot really")
    said = say("data", "multifashion", "--from", "data")
    assert said.code == 2 and "train-images-idx3-ubyte" in said.err


def test_a_data_set_in_a_cache_of_its_own_is_found_as_the_message_says(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("reconmtl.problems.multifashion_data.build_full", lambda _, cache, **__: cache or Path("usual"))
    said = say("data", "multifashion", "--from", "originals", "--cache", "my cache")
    assert f"`RECONMTL_CACHE='{tmp_path}/my cache' reconmtl run multifashion --preset paper` finds it" in said.out
    assert "`reconmtl run multifashion --preset paper` finds it" in say("data", "multifashion", "--from", "x").out


def test_an_existing_folder_is_refused_with_both_ways_out(say: Say) -> None:
    arguments = ("run", *QUICK, "--seeds", "0", "--methods", "joint", "--jobs", "1", "--out", "out")
    assert say(*arguments).code == 0
    again = say(*arguments)
    assert again.code == 2 and "--resume" in again.err and "--overwrite" in again.err
    assert say(*arguments, "--resume").code == 0


# Processes. -----------------------------------------------------------------------------------------------------------


def test_one_command_does_the_whole_of_recon(tmp_path: Path) -> None:
    done = _run("run", "planted", "--seeds", "0", "--out", "here", "--progress", "always", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| joint w/ Recon" in done.stdout
    assert "Results: here" in done.stdout
    assert "probe seed 0" in done.stderr  # progress is on stderr only
    assert "it/s" not in done.stdout
    assert "seed 0" not in done.stdout.partition("| method")[0]
    assert (tmp_path / "here" / "table.md").read_text().strip() in done.stdout


def test_paper_scale_smoke_test_runs_without_the_full_data(say: Say) -> None:
    said = say("run", "multifashion", "--preset", "paper", "--fast-dev-run", "--out", "out")
    assert said.code == 0
    for size in ("42.81", "85.62", "43.30"):  # joint and single-task as published, the 25 smallest layers
        assert f" {size} " in said.out
    assert "numbers mean nothing" in said.out and "mini set instead" in said.err


def test_bad_input_ends_the_process_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = _run("run", "multifashion", "--preset", "papr", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: Unknown preset 'papr' of multifashion. Nearest: 'paper'.\n"
    assert done.stdout == ""


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "reconmtl", "--help"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        process.stdout.close()  # before it could write
        assert process.wait(60) == 0
    assert (tmp_path / "errors").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk")
@pytest.mark.parametrize("words", [("ls",), ("--help",)])
def test_a_result_that_cannot_be_printed_is_a_sentence(words: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "reconmtl", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: The result cannot be printed: No space left on device.")
    assert len(done.stderr.splitlines()) == 1


def test_folders_and_files_that_cannot_be_made_are_a_sentence(say: Say) -> None:
    Path("file").touch()
    words = (*QUICK[:3], "--accelerator", "cpu", "--seeds", "0", "--out")
    for arguments in (("run", *words), ("fit", *words), ("probe", *words), ("sweep", "--problems", *words)):
        said = say(*arguments, "file/x")
        assert said.code == 2 and said.out == "" and said.err.startswith("error: Cannot make the folder file/x: ")
        assert len(said.err.splitlines()) == 1
    assert say("probe", *words, "p", "--quiet").code == 0
    for written in (("rank", "p", "--top", "1", "-o", "file/x.json"), ("report", "p", "--to", "file/x.html")):
        said = say(*written)
        assert said.code == 2 and said.out == "" and said.err.startswith("error: Cannot write file/x.")


def test_your_own_problem_from_a_file(say: Say) -> None:
    Path("mine.py").write_text(
        "from reconmtl.problems import planted\ndef make():\n    return planted.make().replace(name='mine')\n"
    )
    said = say("run", "mine.py:make", "--k", "2", "--jobs", "1")
    assert said.code == 0 and "blocks.4" in said.out and said.err == ""


def test_what_a_problem_prints_does_not_get_into_the_result(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\nfrom reconmtl.problems import planted\nprint('hello')\n"
        "def make():\n    os.system('echo from a program')\n    return planted.make()\n"
    )
    done = _run("fit", "mine.py:make", "--epochs", "1", "--seeds", "0", "1", "--jobs", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.replace("from a program\n", ""))  # of a program that this process started
    assert document["rows"][0]["seeds"] == [0, 1] and "hello" in done.stderr


@pytest.mark.slow
def test_several_devices_train_together_by_one_option(tmp_path: Path) -> None:
    words = ("fit", "planted", "--epochs", "1", "--seeds", "0", "--accelerator", "cpu", "--json", "--out")
    pair = _run(*words, "two", "--batch-size", "16", "--devices", "2", cwd=tmp_path)
    assert pair.returncode == 0, pair.stderr
    alone = _run(*words, "one", "--batch-size", "32", cwd=tmp_path)
    for task in ("plus", "minus"):
        values = [json.loads(done.stdout)["rows"][0]["metrics"][task]["mse"]["mean"] for done in (pair, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    again = _run(*words, "two", "--devices", "2", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("error: The output folder two exists already")


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


@pytest.mark.slow
def test_trainings_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    words = ["run", "planted", "--epochs", "5000", "--probe-epochs", "1", "--seeds", "0", "--jobs", "2", "--out", "o"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reconmtl", *words], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "o" / "single" / "seed0" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    while _alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list((tmp_path / "o").rglob("result.json"))


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


# What was not foreseen. -----------------------------------------------------------------------------------------------


def test_what_a_users_code_raises_ends_in_a_sentence_with_its_place_below_the_traceback(say: Say) -> None:
    Path("mine.py").write_text('def make():\n    raise KeyError("colour")\n')
    said = say("run", "mine.py:make", "--out", "out")
    assert said.code == 2 and said.out == "" and not Path("out").exists()
    assert said.err.startswith("Traceback")
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("error: KeyError: 'colour' (") and "mine.py:2)" in last and "reconmtl check" in last


def test_rank_takes_the_folder_of_a_probe_and_run_takes_top(say: Say) -> None:
    assert say("probe", *QUICK, "--out", "mine", "--quiet").code == 0
    both = [say("rank", folder, "--top", "1", "--json").json for folder in ("mine", "mine/log")]
    assert both[0] == both[1]
    assert say("rank", "mine", "--top", "0").err == "error: --top 0: expected at least 1 layer.\n"
    assert parse("run", ["planted", "--top", "3"])[0].k == 3


def test_a_damaged_finished_run_is_named_with_the_way_out(say: Say) -> None:
    words = ("run", *QUICK, "--seeds", "0", "--methods", "joint", "--jobs", "1", "--quiet", "--out", "out")
    assert say(*words).code == 0
    Path("out/joint/seed0/result.json").write_text("{")
    said = say(*words, "--resume")
    assert said.code == 2 and "joint/seed0/result.json cannot be read as JSON" in said.err
    assert "Delete out/joint/seed0 and repeat with --resume" in said.err
    shutil.rmtree("out/joint/seed0")
    assert say(*words, "--resume").code == 0


# What is said at the end. ---------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal
from reconmtl.problems import planted

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def early():
    interrupt()

class Data(planted.PlantedData):
    left = 100

    def batch(self, indices):
        Data.left -= 1
        if Data.left == 0:
            self.end()
        return super().batch(indices)

class Stops(Data):
    end = staticmethod(interrupt)

class Raises(Data):
    def end(self):
        raise KeyError("colour")

def late():
    Data.left = 24
    return planted.make().replace(train=Stops(512, seed=1))

def wrong():
    Data.left = 24
    return planted.make().replace(train=Raises(512, seed=1))
"""
SHORT = ("--epochs", "2", "--seeds", "0", "--accelerator", "cpu", "--out", "out")


def test_an_interruption_before_the_work_says_that_nothing_was_begun(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(INTERRUPTED)
    for command in (("run",), ("probe",), ("fit",), ("sweep", "--problems")):
        said = say(*command, "mine.py:early", *SHORT)
        assert (said.code, said.err) == (130, "\nInterrupted before anything was begun.\n") and not Path("out").exists()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reconmtl.collecting.find_runs", interrupt)
    assert (said := say("compare", "out")).code == 130 and said.err == "\nInterrupted.\n"


def test_an_interruption_of_a_training_says_where_its_state_is(say: Say) -> None:
    Path("mine.py").write_text(INTERRUPTED)
    said = say("fit", "mine.py:late", *SHORT)
    told = "Interrupted. Saved in epoch 2 of 2, out/seed0/last.ckpt. Repeat the command with --resume to go on."
    assert said.code == 130 and said.err.strip() == told


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("study_jobs", "Nothing is finished yet in out: repeat the command with --resume to begin again."),
        ("conclude", "What is finished is kept in out: repeat the command with --resume to go on."),
    ],
)
def test_an_interruption_between_trainings_says_what_is_kept(
    where: str, told: str, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"reconmtl.study.{where}", interrupt)
    said = say("run", "planted", *SHORT, "--probe-epochs", "1", "--methods", "joint", "--jobs", "1", "--quiet")
    assert said.code == 130 and said.err == f"\nInterrupted. {told}\n"


def test_an_unforeseen_error_says_what_is_kept_only_where_anything_was_begun(say: Say) -> None:
    Path("mine.py").write_text(INTERRUPTED)
    said = say("fit", "mine.py:wrong", *SHORT)
    assert said.code == 2 and "error: KeyError: 'colour' (" in said.err
    kept = "Nothing is finished yet, but what was trained is kept in out: repeat the command with --resume to go on."
    assert kept in said.err
    Path("other.py").write_text("def make():\n    raise KeyError('colour')\n")
    said = say("fit", "other.py:make", *SHORT[:-1], "other")
    assert said.code == 2 and "kept" not in said.err and "--resume" not in said.err


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_was_interrupted_and_resumed_ends_as_one_that_was_not(
    jobs: str, number: signal.Signals, tmp_path: Path
) -> None:
    words = ["run", "planted", "--epochs", "24", "--probe-epochs", "2", "--seeds", "0", "--accelerator", "cpu"]
    words += ["--jobs", jobs, "--out"]
    assert _run(*words, "whole", cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "reconmtl", *words, "parts"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "parts" / "plan.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does for Ctrl-C
    else:
        process.send_signal(number)
    out, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and out == "" and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1 and errors.strip().endswith("with --resume to go on.")
    assert not list((tmp_path / "parts").glob("joint/seed0/result.json"))
    assert _run(*words, "parts", "--resume", cwd=tmp_path).returncode == 0
    names = ("result.json", "last.ckpt", "metrics.jsonl", "plan.json", "grams.safetensors")
    files = [f.relative_to(tmp_path / "whole") for n in names for f in (tmp_path / "whole").rglob(n)]
    assert len(files) > 12
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
