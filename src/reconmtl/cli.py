"""The command line: which command, its options from file and words, and how it ends; `commands` does the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from reconmtl.commands import COMMANDS, preflight
from reconmtl.configuration import read_config
from reconmtl.errors import ConfigError, Interrupted, ReconError, nearest
from reconmtl.interruptions import keeping
from reconmtl.settings import File
from reconmtl.version import __version__

ABOUT = "Find the layers of a multi-task network that the tasks fight over, and give just those one copy per task."
GROUPS = {
    "Look first": ("ls", "check", "data"),
    "All at once": ("run", "sweep"),
    "Step by step": ("probe", "rank", "fit"),
    "Results": ("compare", "report"),
    "The paper": ("paper",),
}
EXAMPLES = (
    "reconmtl run multifashion",
    "reconmtl check my_file.py:my_function",
    "reconmtl compare runs/multifashion-demo",
)
TRAINING = ("run", "sweep", "probe", "fit")
"""Commands that train a problem."""
EXIT_BAD_INPUT = 2
EXIT_INCOMPLETE = 3
EXIT_INTERRUPTED = 130
EXIT_CODES = {
    0: "done",
    EXIT_BAD_INPUT: "bad input, or a training that failed: a sentence on stderr says what to change",
    EXIT_INCOMPLETE: "a sweep ended, but some of its trainings failed",
    EXIT_INTERRUPTED: "interrupted by SIGINT (Ctrl-C) or SIGTERM; a sentence on stderr says what is kept",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None takes those of this process.

    Returns:
        Its exit code, one of `EXIT_CODES`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    here = threading.current_thread() is threading.main_thread()  # only there may signals be handled
    # SIGTERM is a cluster's or a service's way of asking to stop.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if here else None
    try:
        with _speaking():
            code = _dispatch(words)
            _print("")  # here, where a reader that has gone is no error
        return code
    except ReconError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as asked:
        saved = f". {asked.saved}" if isinstance(asked, Interrupted) and asked.saved else ""
        early = " before anything was begun." if {*words[:1]} & {*TRAINING} else "."
        print(f"\nInterrupted{saved or early}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as done:  # the parser's way out, after it has said why
        return done.code if isinstance(done.code, int) else EXIT_BAD_INPUT
    except BrokenPipeError:  # whoever reads us has seen enough, `head` say
        _mute()
        return 0
    except _Unprinted as error:
        _mute()
        print(
            f"error: The result cannot be printed: {error}. What was to be written to files is there.", file=sys.stderr
        )
        return EXIT_BAD_INPUT
    except Exception as error:  # a user's code may raise anything, and we may be wrong
        from reconmtl.workers import sentence

        traceback.print_exception(error)  # with a note of what is kept, if anything was begun
        hint = (
            "; `reconmtl check PROBLEM` looks for everything that is wrong with a problem"
            if {*words[:1]} & {*TRAINING}
            else ""
        )
        print(f"error: {sentence(error)}. The traceback is above{hint}.", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _speaking() -> Iterator[None]:
    """Of several processes that `torchrun` has started, let the first one alone print results."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _dispatch(words: list[str]) -> int:
    first = words[0] if words else None
    if first in ("--version", "-V"):
        print(f"reconmtl {__version__}")
        return 0
    if first in ("--help", "-h", "help"):
        _print(f"{overview()}\n")
        return 0
    if first is None:
        print(overview(), file=sys.stderr)
        return EXIT_BAD_INPUT
    if first not in COMMANDS:
        raise ConfigError(f"Unknown command {first!r}. {nearest(first, COMMANDS)} See `reconmtl --help`.")
    options, faults = parse(first, words[1:])
    if (getattr(options, "devices", None) or 1) > 1 and "WORLD_SIZE" not in os.environ:
        return _torchrun(options, faults, words)
    with redirect_stdout(sys.stderr):  # what a user's code prints must not get into the result
        code, text = COMMANDS[first].act(options, faults)
    _print(f"{text}\n")
    return code


class _Unprinted(Exception):
    """stdout takes nothing more; its disk is full, say."""


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unprinted(error.strerror or str(error)) from None


def _mute() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush fails again


def _torchrun(options: Any, faults: Sequence[str], words: Sequence[str]) -> int:  # noqa: ANN401 any command's
    """Start the command again, in a process per device."""
    folder = preflight(options, faults)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.devices}", "-m", "reconmtl"]
    with keeping(folder), subprocess.Popen([sys.executable, *start, *words]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)  # it hands this on, and each of them saves its state
            process.wait()
            raise
    return code if code in EXIT_CODES else EXIT_BAD_INPUT


def overview() -> str:
    """What `reconmtl --help` prints."""
    grouped = [name for names in GROUPS.values() for name in names]
    groups = {**GROUPS, "Further": tuple(name for name in COMMANDS if name not in grouped)}
    lines = ["usage: reconmtl COMMAND ...", "", ABOUT]
    for title, names in groups.items():
        there = [name for name in names if name in COMMANDS]
        lines += ["", f"{title}:"] if there else []
        lines += [f"  {name:9}{_about(COMMANDS[name].options)}" for name in there]
    lines += ["", "Examples:", *(f"  {line}" for line in EXAMPLES)]
    lines += ["", "Exit codes:", *(f"  {code:<5}{told}" for code, told in EXIT_CODES.items())]
    lines += ["", "`reconmtl COMMAND --help` lists a command's options; --version prints the version."]
    return "\n".join(lines)


def _about(options: type) -> str:
    return " ".join((options.__doc__ or "").split())


def parse(name: str, words: Sequence[str]) -> tuple[Any, list[str]]:
    """The options of a command: from a file of options, overridden by the command line.

    Args:
        name: Of the command.
        words: What follows it; `--config FILE` names the file, of a sweep also its first word.

    Returns:
        Its dataclass, and a sentence per key or value of the file that cannot be used.

    Raises:
        ConfigError: If the file cannot be read.
        SystemExit: If the words cannot be parsed, or ask for help; after printing.
    """
    kind = COMMANDS[name].options
    groups = kind.__bases__
    values: dict[str, Any] = {}
    faults: list[str] = []
    path = _config_of(words)
    if path is None and name == "sweep":
        path = _parsed(name, {}, words).file
    if path is not None:
        values, faults = read_config(path, kind)
    parsed = _parsed(name, values, words)
    flat = {f.name: getattr(getattr(parsed, _title(group)), f.name) for group in groups for f in fields(group)}
    return kind(**flat), faults


def _config_of(words: Sequence[str]) -> Path | None:
    """What --config names; the parser reads it a second time, with the file's values as defaults."""
    found = None
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith("--config="):
            found = word.partition("=")[2]
    return None if found is None else Path(found)


def _parsed(name: str, values: dict[str, Any], words: Sequence[str]) -> Any:  # noqa: ANN401 a class made here
    """Parse words, with values of a file as defaults, into a field per group: that is what help is ordered by."""
    kind = COMMANDS[name].options
    members: list[tuple[str, Any, Any]] = []
    for group in kind.__bases__:
        given = {f.name: values[f.name] for f in fields(group) if f.name in values}
        required = {f.name for f in fields(group) if f.default is MISSING and f.default_factory is MISSING} - set(given)
        members.append((_title(group), group, field(default=group(**given, **dict.fromkeys(required, tyro.MISSING)))))
    told = "YAML file with values of these options; those given here win."
    members.append(("config", Annotated[File, tyro.conf.arg(help=told)], field(default=None)))
    if name == "sweep":
        position: Any = Annotated[
            File, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]", help="The same as --config FILE.")
        ]
        members.append(("file", position, field(default=None)))
    examples = "\n".join(f"  {line}" for line in getattr(kind, "examples"))  # noqa: B009 not of every type
    return tyro.cli(
        make_dataclass("Words", members, frozen=True, kw_only=True),
        args=list(words),
        prog=f"reconmtl {name}",
        description=f"{_about(kind)}\n\nExamples:\n{examples}",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _title(group: type) -> str:
    """Heading of a group of options."""
    return group.__name__.removesuffix("Options").lower()


if __name__ == "__main__":
    sys.exit(main())
