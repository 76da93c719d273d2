"""Values of Python as plain JSON, to cross between the sandbox and whoever grades; nothing that is read back can run.

The standard library alone: the sandbox imports this file without the rest of the package.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

MAX_PLAIN_BITS = 4096
"""Longer integers are written in hexadecimal, which is read in linear time and has no limit on its digits."""
MAX_OUTPUT_CHARACTERS = 1 << 16
"""Of the canonical text of an output; of a longer one its hash alone leaves the sandbox."""

_PLAIN_TYPES = {str, float, bool, type(None)}
_FAST_TEXTS: dict[type, Callable[[Any], str]] = {str: repr, int: hex}
"""What `canonical_text` says of the items of sequences of one type."""


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
            return _encode_items(value)
        case tuple():
            return {"tuple": _encode_items(value)}
        case set():
            return {"set": _encode_items(value)}
        case frozenset():
            return {"frozenset": _encode_items(value)}
        case dict():
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    return {"object": type(value).__qualname__}


def _encode_items(items: Collection[Any]) -> list[Any]:
    # some problems return 10^8 of them
    return list(items) if set(map(type, items)) <= _PLAIN_TYPES else [encode(item) for item in items]


def encode_output(value: Any) -> Any:
    """A value as `encode` writes it, or `{"digest": SHA-256 of its canonical text}` where that is long.

    Of a list or tuple no more is held at once than its longest item needs.
    """
    if not isinstance(value, list | tuple):
        encoded = encode(value)
        try:
            text = canonical_text(encoded)
        except ValueError:
            return encoded
        return encoded if len(text) <= MAX_OUTPUT_CHARACTERS else {"digest": _sha256(text).hexdigest()}
    opening, closing = "[]" if isinstance(value, list) else "()"
    digest, length, items = _sha256(opening), 2, []
    for number, item in enumerate(value):
        encoded = encode(item)
        try:
            text = f",{canonical_text(encoded)}" if number else canonical_text(encoded)
        except ValueError:
            return encode(value)
        digest.update(text.encode(errors="surrogatepass"))
        length += len(text)
        if length <= MAX_OUTPUT_CHARACTERS:
            items.append(encoded)
    if length > MAX_OUTPUT_CHARACTERS:
        digest.update(closing.encode())
        return {"digest": digest.hexdigest()}
    return items if isinstance(value, list) else {"tuple": items}


def _sha256(text: str) -> Any:
    return hashlib.sha256(text.encode(errors="surrogatepass"))


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
        case {"frozenset": [*items]}:
            return frozenset(decode(item) for item in items)
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
            return f"[{','.join(_texts(items))}]"
        case {"int": str(digits)}:
            return _number_text(int(digits, 16))
        case {"complex": [bool() | int() | float() as real, bool() | int() | float() as imaginary]}:
            return (
                f"{_number_text(real)}+{_number_text(imaginary)}j" if imaginary != 0 else _number_text(real)
            )
        case {"bytes": str(digits)}:
            return f"b{digits!r}"
        case {"tuple": [*items]}:
            return f"({','.join(_texts(items))})"
        case {"set": [*items]} | {"frozenset": [*items]}:
            return f"{{{','.join(sorted(_texts(items)))}}}"
        case {"dict": [*pairs]}:
            return f"dict{{{','.join(sorted(map(_pair_text, pairs)))}}}"
        case {"digest": str(digest)}:
            return f"digest {digest!r}"
    raise ValueError("not a value that can be compared")


def _texts(items: list[Any]) -> Iterable[str]:
    types = set(map(type, items))
    return map(_FAST_TEXTS.get(types.pop(), canonical_text) if len(types) == 1 else canonical_text, items)


def _pair_text(pair: Any) -> str:
    match pair:
        case [key, item]:
            return f"{canonical_text(key)}:{canonical_text(item)}"
    raise ValueError("not a pair of a key and its value")


def _number_text(number: float) -> str:
    if isinstance(number, float) and not (math.isfinite(number) and number.is_integer()):
        return number.hex()
    return hex(int(number))
