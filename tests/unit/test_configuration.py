"""Files of options: what they may hold, and that whatever they hold ends in a value or a sentence."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reconmtl.commands import COMMANDS
from reconmtl.configuration import from_mapping, read_config
from reconmtl.errors import ConfigError
from reconmtl.settings import Settings


@dataclass
class Options:
    """One field of every kind."""

    count: Annotated[int | None, "told"] = None
    rate: float = 0.0
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    folder: Path | None = None
    sure: bool = False


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return path


def test_values_get_the_types_of_their_fields(tmp_path: Path) -> None:
    text = "count: 3\nrate: 1e-3\nnames: one\nkind: b\nfolder: x/y\nsure: true\n"
    values, faults = read_config(write(tmp_path, text), Options)
    assert not faults and Options(**values) == Options(3, 0.001, ("one",), "b", Path("x/y"), True)
    assert read_config(write(tmp_path, "count: null\nnames: [p, q]\nrate: 2"), Options)[0] == {
        "count": None,
        "names": ("p", "q"),
        "rate": 2.0,
    }
    assert read_config(write(tmp_path, ""), Options) == ({}, [])
    assert from_mapping({"norm-stats": "shared"}, Settings)[0] == {"norm_stats": "shared"}


def test_every_unknown_key_and_wrong_value_is_named(tmp_path: Path) -> None:
    text = "cuont: 3\ncount: true\nrate: fast\nnames: [1]\nkind: c\nsure: 1\nfolder: [x]\n7: 8\n"
    path = write(tmp_path, text)
    values, faults = read_config(path, Options)
    assert values == {}
    assert faults == [
        f"{path}: {fault}"
        for fault in (
            "Unknown key 'cuont'. Nearest: 'count'.",
            "count = True: expected a whole number.",
            "rate = 'fast': expected a number.",
            "names = [1]: expected a list, each text.",
            "kind = 'c': expected one of ['a', 'b'].",
            "sure = 1: expected true or false.",
            "folder = ['x']: expected a path.",
            "Unknown key '7'. Known: 'count', 'rate', 'names', 'kind', 'folder', 'sure'.",
        )
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n- b\n", "found a list"),
        ("just text", "found text"),
        ("a: [1", "is not YAML"),
        ("a: !!python/object/apply:os.system ['touch owned']", "is not YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("count: 1\ncount: 2", "'count' is given twice"),
        ("a: !!int ''", "cannot be read"),
        ("a: " + "[" * 5000, "cannot be read"),
        ("a: " + "x" * 2**21, "more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_file_of_options_is_refused(
    text: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        read_config(write(tmp_path, text), Options)
    assert not Path("owned").exists()


def test_a_missing_file_and_one_that_is_no_text_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_config(tmp_path / "none.yaml", Options)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read|is not YAML"):
        read_config(tmp_path / "bytes", Options)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path, Options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_can_stand_in_a_file(name: str) -> None:
    kind = COMMANDS[name].options
    known = {f.name: f.default for f in fields(kind) if isinstance(f.default, (int, float, str, bool, tuple))}
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in known.items()}
    values, faults = from_mapping(yaml.safe_load(yaml.safe_dump(plain)), kind)
    assert values == known and not faults


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([f.name for f in fields(Settings)]) | st.text(max_size=8) | st.integers()


@given(st.dictionaries(KEYS, JSON, max_size=5))
def test_any_mapping_is_values_of_the_right_types_or_sentences(content: dict[Any, Any]) -> None:
    values, faults = from_mapping(content, Settings)
    assert len(values) + len(faults) == len(content) and all(isinstance(f, str) for f in faults)
    for name in ("epochs", "width", "k"):
        assert type(values.get(name, 1)) in (int, type(None))


def _mutated(base: bytes, edits: list[tuple[int, int]]) -> bytes:
    changed = bytearray(base)
    for at, value in edits:
        changed[at % len(changed)] = value
    return bytes(changed)


BASE = b"problem: planted\nseeds: [0, 1]\nlr: 0.1\nresume: true\nout: 'runs/x'\n# end\n"
EDITS = st.lists(st.tuples(st.integers(0, len(BASE)), st.integers(0, 255)), max_size=6)


def _reads_or_says(content: bytes, folder: Path) -> None:
    path = folder / "options.yaml"
    path.write_bytes(content)
    try:
        values, faults = read_config(path, Settings)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(values, dict) and all(str(path) in f for f in faults)


@settings(max_examples=200)
@given(edits=EDITS)
def test_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, edits: list[Any]) -> None:
    _reads_or_says(_mutated(BASE, edits), tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(content=st.binary(max_size=60) | EDITS.map(lambda edits: _mutated(BASE, edits)))
def test_damaged_files_are_read_or_refused_at_length(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    _reads_or_says(content, tmp_path_factory.getbasetemp())
