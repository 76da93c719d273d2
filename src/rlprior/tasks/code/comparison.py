"""Whether what a program returned is what was expected, decided outside the process that ran it, on encoded values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rlprior.tasks.code.values import canonical_text

RELATIVE_TOLERANCE = 1e-7
"""Of floating-point outputs, beside the absolute one; that of `numpy.testing.assert_allclose`."""
DEFAULT_TOLERANCE = 1e-6
"""Absolute, where a problem states none and floating-point numbers alone are expected."""

Comparison = Callable[[Any, Any, list[Any], float], bool]
"""Of an output, what is expected, the encoded arguments of the call, and the problem's absolute tolerance (0 if it states none)."""


def is_expected(comparison: str, output: Any, expected: Any, arguments: Any, tolerance: float) -> bool:
    """Whether an output counts as what is expected.

    Args:
        comparison: a key of `COMPARISONS`.
        output: encoded, from a process that is not trusted.
        expected: encoded.
        arguments: of the call: one encoded list or tuple.
        tolerance: absolute, of floating-point outputs; 0 for the default.

    Source: evalplus, evalplus/eval/__init__.py.
    Differs: NaN equals NaN; floating-point numbers have their tolerance inside sequences with other values too; a tolerance holds for
    the output that it is for, not for those that follow; of an output whose canonical text is longer than 65,536 characters the
    hash alone is compared, so exactly.

    >>> is_expected("equal", [0.1, 0.2 + 1e-9], [0.1, 0.2], [], 0), is_expected("exact", 0.2 + 1e-9, 0.2, [], 0)
    (True, False)
    """
    try:
        return COMPARISONS[comparison](output, expected, arguments, tolerance)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False  # an output that is no value


def _is_exact(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    return canonical_text(output) == canonical_text(expected)


def _is_equal(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    if _is_exact(output, expected, arguments, tolerance):
        return True
    if not tolerance and _is_floats(expected):
        tolerance = DEFAULT_TOLERANCE
    return tolerance > 0 and type(output) is type(expected) and _is_close(output, expected, tolerance)


def _is_floats(expected: Any) -> bool:
    items = _sequence(expected)
    return isinstance(expected, float) or (bool(items) and all(isinstance(item, float) for item in items))


def _sequence(encoded: Any) -> list[Any]:
    match encoded:
        case [*items] | {"tuple": [*items]}:
            return items
    return []


def _is_close(output: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(output, int | float) and isinstance(expected, int | float):
        return math.isclose(
            output, expected, rel_tol=0, abs_tol=tolerance + RELATIVE_TOLERANCE * abs(expected)
        )
    match (output, expected):
        case ([*ours], [*theirs]) | ({"tuple": [*ours]}, {"tuple": [*theirs]}):
            pairs = zip(ours, theirs, strict=False)
            return len(ours) == len(theirs) and all(_is_close(one, other, tolerance) for one, other in pairs)
        case ({"complex": [real, imaginary]}, {"complex": [float(a), float(b)]}):
            return abs(complex(real, imaginary) - complex(a, b)) <= tolerance + RELATIVE_TOLERANCE * abs(
                complex(a, b)
            )
    return canonical_text(output) == canonical_text(expected)


def _is_same_set(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    """Of two collections, whose order and repetitions do not count."""
    return _members(output) == _members(expected)


def _members(encoded: Any) -> set[str]:
    match encoded:
        case [*items] | {"tuple": [*items]} | {"set": [*items]} | {"frozenset": [*items]}:
            return {canonical_text(item) for item in items}
        case {"dict": [*pairs]}:
            return {canonical_text(key) for key, _ in pairs}
        case str():
            return {canonical_text(character) for character in encoded}
    raise ValueError("not a collection")


def _exists(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    """A match or none, of which any object may tell: only whether it is None counts, and of a truth value what it says."""
    if isinstance(output, bool):
        return output == (expected is not None)
    return (output is None) == (expected is None)


def _is_root(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    """Of the polynomial whose coefficients are the argument, lowest first: of its roots any will do."""
    coefficients = _sequence(arguments)[0]
    return abs(sum(c * math.pow(output, power) for power, c in enumerate(coefficients))) <= tolerance


def _is_surface_area(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    """Of a square pyramid: the second argument may be read as the slant height or as the height."""
    if _is_equal(output, expected, arguments, tolerance):
        return True
    edge, height = _sequence(arguments)
    return abs(output - round(edge**2 + 2 * edge * math.hypot(edge / 2, height))) <= tolerance


def _is_digit_distance(output: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    """The digits of two numbers compared place by place from the right, or as the reference solution does it."""
    if _is_equal(output, expected, arguments, tolerance):
        return True
    one, other = map(str, _sequence(arguments))
    width = max(len(one), len(other))
    pairs = zip(one.zfill(width), other.zfill(width), strict=True)
    return _is_exact(output, sum(abs(int(a) - int(b)) for a, b in pairs), arguments, tolerance)


COMPARISONS: dict[str, Comparison] = {
    "exact": _is_exact,
    "equal": _is_equal,
    "set": _is_same_set,
    "existence": _exists,
    "root": _is_root,
    "surface_area": _is_surface_area,
    "digit_distance": _is_digit_distance,
}
"""How outputs may be compared; those after "equal" are of single problems, as evalplus compares them."""
