"""The command line: dataclasses and dispatch, nothing else. Torch is imported by the commands that need it."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reconmtl.errors import ReconError, UnknownNameError, nearest
from reconmtl.problems import READY
from reconmtl.settings import Preset, Settings
from reconmtl.version import __version__

ABOUT = """Find the layers of a multi-task network that the tasks fight over, and give just those one copy per task.

Start with `reconmtl run multifashion`; `reconmtl run --help` lists what can be chosen. --version prints the version."""
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Ls:
    """List the ready problems and their presets, the first of which is the default."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Build the full data set of a ready problem from its original files, into a cache folder."""

    problem: Annotated[str, tyro.conf.Positional]
    """multifashion."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder with the original files, e.g. mnist/ and fashion-mnist/."""
    download: bool = False
    """Fetch the original files from their public mirrors first (into the folder given by --from, or the cache)."""
    cache: Path | None = None
    """Where the data set is kept; by default the platform's cache folder, or $RECONMTL_CACHE."""
    seed: int = 0
    """Of the composition."""
    overwrite: bool = False
    """Replace a data set that is there."""


Command = (
    Annotated[Settings, tyro.conf.subcommand("run")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Ls, tyro.conf.subcommand("ls")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 for bad input (a sentence on stderr), 130 when interrupted."""
    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a cluster's or a service's way of asking to stop
    try:
        if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
            print(f"reconmtl {__version__}")
            return 0
        command = tyro.cli(Command, args=arguments, prog="reconmtl", description=ABOUT)
        return _dispatch(command)
    except ReconError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept: repeat the command with --resume.", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(command: Settings | Data | Ls) -> int:
    if isinstance(command, Settings):
        return _run(command)
    if isinstance(command, Data):
        return _data(command)
    return _ls()


def _ls() -> int:
    from reconmtl.choices import find_problem

    for name, about in READY.items():
        print(f"{name:14}{about}")
        presets = find_problem(name)[1]
        for preset, values in presets.items():
            print(f"{'':14}--preset {preset}: {_scale(values)}")
    return 0


def _scale(preset: Preset) -> str:
    options = [f"{n} {v}" for n, v in preset.options.items()]
    seeds = f"{len(preset.seeds)} seed{'s' * (len(preset.seeds) > 1)}"
    length = f"{preset.epochs} epochs ({preset.probe_epochs} probed)"
    return ", ".join(
        [*options, length, f"batch {preset.batch_size}", f"K = {preset.k}", f"S = {preset.severity:g}", seeds]
    )


def _run(settings: Settings) -> int:
    from reconmtl.study import run_study

    study = run_study(settings)
    if settings.json:
        import json

        print(json.dumps(study.comparison.to_dict()))
    else:
        print(
            f"{study.text}\n\nResults: {study.folder} (table.md, comparison.json, plan.json, log/, a folder per method)"
        )
    return 0


def _data(command: Data) -> int:
    from reconmtl.problems import idx, multifashion_data

    if command.problem != "multifashion":
        raise UnknownNameError(
            f"No data set to build for {command.problem!r}. {nearest(command.problem, ['multifashion'])}"
        )
    source = command.source
    if source is None and not command.download:
        raise UnknownNameError("Say where the original files are: --from DIR, or --download to fetch them.")
    if command.download:
        source = source or (command.cache or multifashion_data.cache_folder()) / "original"
        idx.download(source)
    assert source is not None
    folder = multifashion_data.build_full(source, cache=command.cache, seed=command.seed, overwrite=command.overwrite)
    print(f"Multi-Fashion+MNIST is in {folder}; `reconmtl run multifashion --preset paper` finds it there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
