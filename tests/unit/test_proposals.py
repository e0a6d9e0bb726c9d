"""The commands that a report proposes exist."""

import dataclasses
from pathlib import Path

import pytest

from reconmtl.cli import main
from reconmtl.reporting.material import gather
from reconmtl.reporting.page import sections
from reconmtl.reporting.windows import Windows
from studies import network_names, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), tasks=["seg", "depth", "edges"], layers=network_names(12))


def test_every_command_on_the_page_is_one_that_the_program_takes(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    material = gather(study)
    assert material.log is not None
    for part in sections(material, Windows.of(material.log, severity=-0.1)):
        words = part.command.split()
        assert (
            words[:2] == ["reconmtl", "rank"] or "--epochs 6" in part.command
        )  # the study's own settings are repeated
        assert main([*words[1:], "--help"]) == 0
        text = capsys.readouterr().out
        assert all(w in text for w in words if w.startswith("--"))
    zero = dataclasses.replace(material, severity=0.0)
    assert any("--severity=-0.1" in p.command for p in sections(zero, None))
