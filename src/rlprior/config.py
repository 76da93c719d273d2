"""Configuration as data: frozen keyword-only dataclasses from and to TOML, and the two errors a user can meet.

One decoder serves files and `--section.key=value` overrides alike, so both give the same errors: what is wrong, where, and what to
write instead.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


class UsageError(Exception):
    """What the user asked for makes no sense; one line that says what, where, and what to write instead. Exit code 2."""


class RunError(Exception):
    """A sound request that failed while running; one line that says what and where. Exit code 1."""


def load_config(config_type: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a TOML file into `config_type`, with `section.key=value` overrides applied on top.

    Raises:
        UsageError: the file is missing, is not UTF-8 or not TOML, or holds an unknown key or a value that does not fit.
    """
    return decode(config_type, apply_overrides(read_toml(path), overrides), source=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; UsageError with the path and the parser's position where it is not one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give the path of a TOML file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a directory; give the path of a TOML file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tables` with `section.key=value` strings applied; a value is TOML, or else taken as a string.

    >>> apply_overrides({"rl": {"steps": 1}}, ["rl.steps=5", "name=x"])
    {'rl': {'steps': 5}, 'name': 'x'}
    """
    result = copy.deepcopy(dict(tables))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--{override}: write --section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        _assign(result, key.split("."), value, override)
    return result


def _assign(table: Any, path: list[str], value: Any, override: str) -> None:
    for position, name in enumerate(path):
        last = position == len(path) - 1
        if isinstance(table, list):
            items = cast(list[Any], table)
            if not name.isdecimal() or int(name) >= len(items):
                places = f"a position from 0 to {len(items) - 1}" if items else "left out: the list is empty"
                raise UsageError(f"--{override}: {name!r} must be {places}")
            if last:
                items[int(name)] = value
            else:
                table = items[int(name)]
        elif isinstance(table, dict):
            entries = cast(dict[str, Any], table)
            if last:
                entries[name] = value
            else:
                table = entries.setdefault(name, {})
        else:
            raise UsageError(f"--{override}: {'.'.join(path[:position])} is a value, not a section")


def decode(config_type: type[T], data: Any, *, source: str, where: str = "") -> T:
    """Build `config_type` from TOML data, strictly: no unknown key, no value of another type.

    Args:
        config_type: a config dataclass.
        data: what the TOML parser returned for it.
        source: the file that errors name.
        where: dotted path of `data` inside the file.

    Raises:
        UsageError: with the dotted path, and a suggestion for a misspelt key.
    """
    return cast(T, _decode(config_type, data, source, where))


_EXPECTED: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "a string",
    bool: "true or false",
    tuple: "a list",
    dict: "a table",
}


def _expected(kind: Any) -> str:
    return _EXPECTED.get(kind, str(kind))


def _decode(kind: Any, data: Any, source: str, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, source, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, source, where)
    if origin is typing.Literal:
        if data in arguments:
            return data
        raise _mismatch(f"one of {', '.join(map(repr, arguments))}", data, source, where)
    if origin is tuple and isinstance(data, list | tuple):
        items = cast(Sequence[Any], data)
        return tuple(_decode(arguments[0], item, source, f"{where}.{i}") for i, item in enumerate(items))
    if origin is dict and isinstance(data, dict):
        entries = cast(dict[str, Any], data)
        return {key: _decode(arguments[1], item, source, f"{where}.{key}") for key, item in entries.items()}
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        with contextlib.suppress(OverflowError):
            return float(data)
    if kind in (int, str, bool) and type(data) is kind:
        return data
    raise _mismatch(_expected(origin or kind), data, source, where)


def _decode_union(options: tuple[Any, ...], data: Any, source: str, where: str) -> Any:
    options = tuple(option for option in options if option is not types.NoneType)
    if len(options) == 1:
        return _decode(options[0], data, source, where)
    tagged: dict[str, Any] = {option.name: option for option in options if hasattr(option, "name")}
    if len(tagged) != len(options):
        for option in options:
            try:
                return _decode(option, data, source, where)
            except UsageError:
                continue
        raise _mismatch(" or ".join(getattr(o, "__name__", str(o)) for o in options), data, source, where)
    if not isinstance(data, dict) or "name" not in data:
        raise UsageError(f"{source}: {where or 'the file'} needs a name, one of {', '.join(sorted(tagged))}")
    entries = dict(cast(dict[str, Any], data))
    name = entries.pop("name")
    if not isinstance(name, str) or name not in tagged:
        raise UsageError(
            f"{source}: {_join(where, 'name')} = {name!r} is unknown{_suggest(str(name), list(tagged))}"
        )
    return _decode_dataclass(tagged[name], entries, source, where)


def _decode_dataclass(kind: type, data: Any, source: str, where: str) -> Any:
    if not isinstance(data, dict):
        raise _mismatch("a table", data, source, where)
    entries = cast(dict[str, Any], data)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in entries:
        if key not in fields:
            raise UsageError(f"{source}: unknown key {_join(where, key)!r}{_suggest(key, list(fields))}")
    missing = dataclasses.MISSING
    for name, field in fields.items():
        if field.default is missing and field.default_factory is missing and name not in entries:
            raise UsageError(f"{source}: {_join(where, name)} is missing; add it")
    values = {key: _decode(hints[key], value, source, _join(where, key)) for key, value in entries.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(f"{source}: {where + ': ' if where else ''}{error}") from None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _mismatch(expected: str, data: Any, source: str, where: str) -> UsageError:
    return UsageError(f"{source}: {where or 'the file'} must be {expected}, not {data!r}")


HOW = {"how": True}
"""Metadata of a field that says how something is computed and not what: speed, memory and rounding alone depend on it."""


def encode(config: Any, *, with_how: bool = True) -> Any:
    """Plain TOML data of a config: tuples become lists, `None` entries are left out, tagged unions carry their `name`.

    Args:
        config: a config dataclass, or plain data that may hold some.
        with_how: include fields marked with `HOW`.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        tag = None if any(field.name == "name" for field in fields) else getattr(type(config), "name", None)
        table: dict[str, Any] = {"name": tag} if tag else {}
        for field in fields:
            value = getattr(config, field.name)
            if value is not None and field.init and (with_how or "how" not in field.metadata):
                table[field.name] = encode(value, with_how=with_how)
        return table
    if isinstance(config, Mapping):
        entries = cast(Mapping[str, Any], config)
        return {key: encode(value, with_how=with_how) for key, value in entries.items() if value is not None}
    if isinstance(config, list | tuple):
        return [encode(item, with_how=with_how) for item in cast(Sequence[Any], config)]
    return config


def fingerprint(value: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of the canonical JSON of plain data or of a config.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing_keys(left: Any, right: Any, where: str = "") -> list[str]:
    """Dotted keys at which two pieces of plain data differ, in order.

    >>> differing_keys({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c']
    """
    if isinstance(left, dict) and isinstance(right, dict):
        one, two = cast(dict[str, Any], left), cast(dict[str, Any], right)
        keys = [*one, *(key for key in two if key not in one)]
        return [
            found for key in keys for found in differing_keys(one.get(key), two.get(key), _join(where, key))
        ]
    # as fingerprints compare: 1 and 1.0, equal in Python, are two configs
    return [] if fingerprint(left) == fingerprint(right) else [where]
