"""Bars are shown where somebody sees them, and where somebody asks for them; otherwise nothing is written."""

import io
from collections.abc import Iterator

import pytest

from reconmtl.progress import Mode, bar, configure


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    configure("auto")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("mode", "stream", "shown"),
    [
        ("auto", Terminal, True),
        ("auto", io.StringIO, False),
        ("always", Terminal, True),
        ("always", io.StringIO, True),
        ("never", Terminal, False),
        ("never", io.StringIO, False),
    ],
)
@pytest.mark.parametrize("position", [None, 1])
def test_a_bar_is_shown_or_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: Mode,
    stream: type[io.StringIO],
    shown: bool,
    position: int | None,
) -> None:
    err = stream()
    monkeypatch.setattr("sys.stderr", err)
    configure(mode, position=position)
    with bar(3, "joint seed 0") as progress:
        for _ in range(3):
            progress.update()
        progress.set_postfix_str("epoch 1/1, loss 0.5")
    written = err.getvalue()
    if shown:
        assert "joint seed 0" in written and "/3" in written
        if position is None or stream is io.StringIO:  # bars of workers leave the terminal when they are done
            assert "3/3" in written and "loss 0.5" in written and written.endswith("\n")
    else:
        assert written == ""
    assert capsys.readouterr().out == ""
