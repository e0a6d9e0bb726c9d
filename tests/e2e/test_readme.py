"""Every code block of the README runs as it stands."""

import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import reconmtl as rm
from reconmtl.cli import main
from reconmtl.networks import resnet
from reconmtl.problems.multifashion_data import MultiFashion, load_mini

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[str]:
    found = [code for kind, code in BLOCKS if kind == language]
    assert found, f"README has no {language} block"
    return found


def _few(data: MultiFashion, n: int) -> MultiFashion:
    return MultiFashion(data.images[:n], data.labels[:n])


def test_every_block_is_of_a_kind_that_is_run_here() -> None:
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "diff"}


def test_your_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    code = _blocks("python")[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15
    train, test = load_mini()
    names: dict[str, Any] = {
        "make_model": partial(resnet.multifashion, width=4),
        "train_set": _few(train, 64),
        "test_set": _few(test, 32),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["plan"]) == 25
    printed = capsys.readouterr().out
    assert "| joint w/ Recon" in printed
    assert "digit acc ↑" in printed


def test_splitting_a_hugging_face_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, code = _blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    said = re.search(r"print\(.*# (.*)", code)
    assert said is not None
    assert capsys.readouterr().out.strip() == said[1]
    assert (tmp_path / "vit-depth" / "config.json").exists()


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"^[A-Z_]{6,}$", README, flags=re.MULTILINE)


def test_your_own_loop_is_a_diff_of_a_few_lines() -> None:
    (diff,) = _blocks("diff")
    lines = diff.splitlines()
    assert sum(line[0] in "+-" for line in lines if line) <= 5
    plain, probed = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    states = []
    for code in (plain, probed):
        torch.manual_seed(0)
        make_model = partial(resnet.multifashion, width=4)
        model = make_model()
        train, _ = load_mini()
        batches: list[tuple[Tensor, dict[str, Tensor]]] = [train.batch(torch.arange(i, i + 16)) for i in (0, 16, 32)]
        names: dict[str, Any] = {
            "rm": rm,
            "model": model,
            "make_model": make_model,
            "loader": batches,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
            "cross_entropy": cross_entropy,
        }
        exec(compile(code, "README.md", "exec"), names)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)
    assert set(names["model"](batches[0][0])) == {"digit", "fashion"}
    assert names["model"] is not model


def _commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for code in _blocks("bash") for line in code.splitlines() if line.strip()]


def test_make_targets_exist() -> None:
    targets = [words[1] for words in _commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_commands_exist_with_these_options(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for words in _commands():
        if words[0] != "reconmtl":
            assert words[0] in ("make", "pip"), words
            continue
        assert main([*words[1:], "--help"]) == 0  # --help at the end still checks every option before it
        options = {w for w in words if w.startswith("--")}
        text = capsys.readouterr().out
        assert all(option in text for option in options), words
        seen.append(words[1])
    assert {"run", "data"} <= set(seen)


def test_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    text = capsys.readouterr().out
    for option in set(re.findall(r"`(--[a-z-]+)`", README)):
        assert option in text, option
