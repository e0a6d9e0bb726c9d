"""Every setting can be given on the command line, and what is not given stays open for the preset."""

from dataclasses import fields
from pathlib import Path

import pytest
import tyro

from reconmtl.settings import METHODS, Preset, Settings


def parse(*arguments: str) -> Settings:
    return tyro.cli(Settings, args=list(arguments))


def test_what_is_not_given_stays_open() -> None:
    settings = parse("planted")
    assert settings == Settings(problem="planted")
    filled = {f.name for f in fields(Preset)} - {"fractions", "options", "note"}
    assert {name: getattr(settings, name) for name in filled} == dict.fromkeys(filled)
    assert set(settings.methods) <= set(METHODS)


def test_every_setting_is_an_option_of_the_command() -> None:
    line = """file.py:make --preset paper --out runs/x --methods joint recon --tasks a b --seeds 3 4 --epochs 2
        --batch-size 8 --lr 0.5 --width 4 --network mtan --data full
        --root d --pretrained w.pth --probe-epochs 1 --severity -0.2 --k 3 --record 0
        --norm-stats shared --init fresh --jobs 2 --accelerator cpu --precision bf16-mixed --compile --resume
        --overwrite --fast-dev-run --devices 2 --sync-batchnorm --progress never --quiet --json
        --loggers tensorboard mine.py:Mine"""
    settings = parse(*line.split())
    expected = Settings(
        problem="file.py:make",
        preset="paper",
        out=Path("runs/x"),
        methods=("joint", "recon"),
        tasks=("a", "b"),
        seeds=(3, 4),
        epochs=2,
        batch_size=8,
        lr=0.5,
        width=4,
        network="mtan",
        data="full",
        root=Path("d"),
        pretrained=Path("w.pth"),
        probe_epochs=1,
        severity=-0.2,
        k=3,
        record=0,
        norm_stats="shared",
        init="fresh",
        jobs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        compile=True,
        resume=True,
        overwrite=True,
        fast_dev_run=True,
        devices=2,
        sync_batchnorm=True,
        progress="never",
        quiet=True,
        json=True,
        loggers=("tensorboard", "mine.py:Mine"),
    )
    assert settings == expected
    default = Settings(problem="other")
    assert not [f.name for f in fields(Settings) if getattr(expected, f.name) == getattr(default, f.name)]


@pytest.mark.parametrize("wrong", [["--epochs", "many"], ["--norm-stats", "none"], ["--epoch", "3"]])
def test_what_cannot_be_read_exits_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("planted", *wrong)
    assert caught.value.code == 2 and wrong[0].strip("-") in capsys.readouterr().err
