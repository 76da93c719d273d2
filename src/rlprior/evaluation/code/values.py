"""Values of Python as plain JSON, to cross between the sandbox and whoever grades; nothing that is read back can run.

The standard library alone: the sandbox imports this file without the rest of the package.
"""

from __future__ import annotations

import math
from typing import Any

MAX_PLAIN_BITS = 4096
"""Longer integers are written in hexadecimal, which is read in linear time and has no limit on its digits."""


def encode(value: Any) -> Any:
    """A value as JSON: numbers, strings, lists and None as themselves, everything else as an object with one key that names the type.

    Subclasses are written as the built-in type they extend. What is no value but an object (a function, an instance of a class) is
    written as the name of its type, and equals nothing.

    >>> encode((1, {2.5: b"x"}))
    {'tuple': [1, {'dict': [[2.5, {'bytes': '78'}]]}]}
    """
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if value.bit_length() <= MAX_PLAIN_BITS else {"int": hex(value)}
        case float():
            return float(value)
        case str():
            return str(value)
        case complex():
            return {"complex": [value.real, value.imag]}
        case bytes() | bytearray():
            return {"bytes": value.hex()}
        case list():
            return [encode(item) for item in value]
        case tuple() | set() | frozenset():
            name = "tuple" if isinstance(value, tuple) else "set"
            return {name: [encode(item) for item in value]}
        case dict():
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    return {"object": type(value).__qualname__}


def decode(encoded: Any) -> Any:
    """The value that `encode` wrote; only for what this package encoded itself, since keys of a set or dict can be chosen to collide.

    Raises:
        ValueError: it is no encoded value.

    >>> decode(encode([(1, 2), {3}, 1j]))
    [(1, 2), {3}, 1j]
    """
    match encoded:
        case None | bool() | int() | float() | str():
            return encoded
        case [*items]:
            return [decode(item) for item in items]
        case {"int": str(digits)}:
            return int(digits, 16)
        case {"complex": [real, imaginary]}:
            return complex(real, imaginary)
        case {"bytes": str(digits)}:
            return bytes.fromhex(digits)
        case {"tuple": [*items]}:
            return tuple(decode(item) for item in items)
        case {"set": [*items]}:
            return {decode(item) for item in items}
        case {"dict": [*pairs]}:
            return {decode(key): decode(item) for key, item in pairs}
    raise ValueError(f"not an encoded value: {str(encoded)[:80]}")


def canonical_text(encoded: Any) -> str:
    """A text that two encoded values share exactly where Python would find the values equal (1, 1.0 and True do), or both are NaN.

    It hashes nothing and decodes nothing, so that an untrusted value cannot make it slow.

    Raises:
        ValueError: it is no encoded value, or holds an object.

    >>> canonical_text({"set": [1, 2.5]}) == canonical_text({"set": [2.5, True]})
    True
    """
    match encoded:
        case None:
            return "None"
        case bool() | int() | float():
            return _number_text(encoded)
        case str():
            return repr(encoded)
        case [*items]:
            return f"[{','.join(map(canonical_text, items))}]"
        case {"int": str(digits)}:
            return _number_text(int(digits, 16))
        case {"complex": [bool() | int() | float() as real, bool() | int() | float() as imaginary]}:
            return (
                f"{_number_text(real)}+{_number_text(imaginary)}j" if imaginary != 0 else _number_text(real)
            )
        case {"bytes": str(digits)}:
            return f"b{digits!r}"
        case {"tuple": [*items]}:
            return f"({','.join(map(canonical_text, items))})"
        case {"set": [*items]}:
            return f"{{{','.join(sorted(map(canonical_text, items)))}}}"
        case {"dict": [*pairs]}:
            return f"dict{{{','.join(sorted(_pair_text(pair) for pair in pairs))}}}"
    raise ValueError("not a value that can be compared")


def _pair_text(pair: Any) -> str:
    match pair:
        case [key, item]:
            return f"{canonical_text(key)}:{canonical_text(item)}"
    raise ValueError("not a pair of a key and its value")


def _number_text(number: float) -> str:
    if isinstance(number, float) and not (math.isfinite(number) and number.is_integer()):
        return number.hex()
    return hex(int(number))
