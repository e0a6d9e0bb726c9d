"""A dataclass from a file: YAML whose keys are the fields; every unknown key and wrong value is named at once."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from reconmtl.errors import ConfigError, nearest

LIMIT = 2**20
"""Bytes of a file: it is written by hand, and YAML can be made to unfold into far more than it holds."""


def read_config(path: str | Path, kind: type) -> tuple[dict[str, Any], list[str]]:
    """Read the values that a YAML file gives to fields of a dataclass.

    Args:
        path: A YAML file with one mapping, field -> value; '-' and '_' in keys are the same. JSON is YAML.
        kind: The dataclass.

    Returns:
        The values, of the fields' types; and a sentence per key or value that cannot be used, which is left out.

    Raises:
        ConfigError: If there is no such file, or it is no mapping.
    """
    file = Path(path)
    try:
        if file.stat().st_size > LIMIT:
            raise ConfigError(f"{file} has more than {LIMIT:,} bytes; expected a short file of options.")
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"There is no file {file}, named by --config.") from None
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:  # of odd !!tags
        raise ConfigError(f"{file} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected lines like `epochs: 3`, found {_name(content)}.")
    values, faults = from_mapping(content, kind)
    return values, [f"{file}: {fault}" for fault in faults]


def from_mapping(content: Mapping[Any, Any], kind: type) -> tuple[dict[str, Any], list[str]]:
    """The same from a mapping: values of the fields' types, and a sentence per key or value that cannot be used."""
    hints = get_type_hints(kind, include_extras=True)
    known = [f.name for f in fields(kind)]
    values: dict[str, Any] = {}
    faults = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            faults.append(f"Unknown key {str(key)!r}. {nearest(name, known)}")
        elif name in values:
            faults.append(f"{name} is given twice, with '-' and with '_'.")
        else:
            try:
                values[name] = _as(hints[name], value)
            except (ValueError, OverflowError):
                faults.append(f"{name} = {value!r:.80}: expected {_expected(hints[name])}.")
    return values, faults


class _Loader(yaml.SafeLoader):
    """Plain data only, no key twice, and no aliases, with which a short file becomes a large one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k.value for k, _ in node.value if isinstance(k.value, str)]
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _as(hint: Any, value: Any) -> Any:  # noqa: ANN401 any type and value
    """The value as the type that a field has; a ValueError if it cannot be."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _as(get_args(hint)[0], value)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return _as(inner, value)
    if origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple:
        inner = get_args(hint)[0]
        return tuple(_as(inner, v) for v in (value if isinstance(value, list) else [value]))
    elif hint is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-3 as text
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError


def _expected(hint: Any) -> str:  # noqa: ANN401
    origin = get_origin(hint)
    if origin is Annotated:
        return _expected(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return _expected(next(a for a in get_args(hint) if a is not type(None)))
    if origin is Literal:
        return f"one of {list(get_args(hint))}"
    if origin is tuple:
        return f"a list, each {_expected(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names[hint]


def _name(value: object) -> str:
    return {"list": "a list", "str": "text"}.get(type(value).__name__, type(value).__name__)
