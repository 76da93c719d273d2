"""Values across a process boundary, what counts as equal, and how outputs of the benchmarks are compared."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.config import UsageError
from rlprior.tasks.code.comparison import COMPARISONS, is_expected
from rlprior.tasks.code.problems import mbpp_reference
from rlprior.tasks.code.seccomp import ALLOWED, syscall_filter
from rlprior.tasks.code.values import (
    MAX_OUTPUT_CHARACTERS,
    canonical_text,
    decode,
    encode,
    encode_output,
)

NUMBERS = st.one_of(
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, 1.0, -0.0, 2**53, 2**53 + 1, float(2**53), math.inf]),
    st.sampled_from([1, -1]).map(
        lambda sign: sign * 10**4000
    ),  # not written out where a strategy is described
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
)
HASHABLE = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(st.characters(), max_size=3), st.binary(max_size=3)),
    lambda inner: st.one_of(st.tuples(inner), st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.sets(HASHABLE, max_size=3),
        st.dictionaries(HASHABLE, inner, max_size=3),
    ),
    max_leaves=8,
)
FEW = st.recursive(
    st.sampled_from([0, False, 1, 1.0, True, 1 + 0j, None, "", "1", b"1", (), frozenset()]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.lists(inner, max_size=2).map(tuple), st.just({1}), st.just({1.0: "1"})
    ),
    max_leaves=3,
)
"""So few values that two of them are often equal."""


def crossed(value: Any) -> Any:
    """An encoded value as it arrives in another process."""
    return json.loads(json.dumps(encode(value)))


@given(VALUES)
def test_what_is_decoded_equals_what_was_encoded(value: Any) -> None:
    back = decode(crossed(value))
    assert back == value
    assert type(back) is type(value)


@given(st.one_of(VALUES, FEW), st.one_of(VALUES, FEW))
def test_canonical_texts_are_equal_where_values_are(one: Any, other: Any) -> None:
    assert (canonical_text(crossed(one)) == canonical_text(crossed(other))) == (one == other)
    assert canonical_text(crossed(one)) == canonical_text(encode(one))


@given(VALUES)
def test_long_outputs_are_hashed_and_others_are_not(value: Any) -> None:
    encoded, text = encode_output(value), canonical_text(encode(value))
    assert encoded == encode(value) if len(text) <= MAX_OUTPUT_CHARACTERS else list(encoded) == ["digest"]


def test_equal_long_outputs_have_one_hash() -> None:
    number = MAX_OUTPUT_CHARACTERS
    for one, other in (([1.0] * number, [True] * number), ("x" * number, "x" * number)):
        assert canonical_text(encode_output(one)) == canonical_text(encode_output(other))
        assert list(encode_output(one)) == ["digest"]
    hashes = {
        str(encode_output(value)) for value in ([1] * number, [2] * number, (1,) * number, "1" * number)
    }
    assert len(hashes) == 4
    # two texts around the limit
    assert encode_output("x" * (number - 2)) == "x" * (number - 2)
    assert list(encode_output("x" * (number - 1))) == ["digest"]


def test_objects_equal_nothing() -> None:
    encoded = encode([object()])
    assert encoded == [{"object": "object"}] == encode_output([object()])
    assert not is_expected("exact", encoded, encoded, [], 0)
    assert not is_expected("equal", encoded, encoded, [], 1)


@pytest.mark.parametrize(
    "forged", [{"set": 5}, {"dict": [1]}, {"dict": [[1]]}, {"int": "q"}, {"any": []}, {}, [{}]]
)
def test_what_is_no_encoded_value_is_not_expected(forged: Any) -> None:
    for comparison in COMPARISONS:
        # a set is compared by its members, and none is a member
        if comparison != "existence":
            assert not is_expected(comparison, forged, [1], [[1, 2], 3], 1e-6)


def test_keys_that_collide_cost_nothing() -> None:
    """A dictionary of them would take hours."""
    modulus = sys.hash_info.modulus
    keys = [number * modulus for number in range(100_000)]
    assert not is_expected("exact", {"dict": [[key, 0] for key in keys]}, {"dict": []}, [], 0)
    assert not is_expected("set", {"set": keys}, {"set": [1]}, [], 0)


CASES: list[tuple[str, Any, Any, Any, float, bool]] = [
    ("exact", 1, True, [], 0, True),
    ("exact", [1], (1,), [], 0, False),
    ("exact", 0.1 + 0.2, 0.3, [], 0, False),
    ("exact", math.nan, math.nan, [], 0, True),
    ("equal", 0.1 + 0.2, 0.3, [], 0, True),
    ("equal", 0.3 + 1e-5, 0.3, [], 0, False),
    ("equal", 1e10 + 500, 1e10, [], 0, True),  # the relative tolerance
    ("equal", 1e10 + 2000, 1e10, [], 0, False),
    ("equal", 3, 3.0 + 1e-9, [], 0, False),  # another type
    ("equal", [0.1 + 0.2, 1.0], [0.3, 1.0], [], 0, True),
    ("equal", [0.1 + 0.2], [0.3, 1.0], [], 0, False),
    ("equal", (0.1 + 0.2,), [0.3], [], 0, False),
    (
        "equal",
        [0.1 + 0.2, 1],
        [0.3, 1],
        [],
        0,
        False,
    ),  # not floating-point numbers alone: no default tolerance
    ("equal", [0.1 + 0.2, 1], [0.3, 1], [], 1e-4, True),
    ("equal", [["a", 0.1 + 0.2]], [["a", 0.3]], [], 1e-4, True),
    ("equal", [["b", 0.1 + 0.2]], [["a", 0.3]], [], 1e-4, False),
    ("equal", 10**400, 10**400 + 1, [], 1e-4, False),
    ("equal", 10**400, 0.5, [], 1e-4, False),
    ("equal", 1j + 1e-9, 1j, [], 1e-4, True),
    ("equal", math.inf, math.inf, [], 1e-4, True),
    ("equal", math.inf, 1.0, [], 1e-4, False),
    ("set", [3, 4, 4], (4, 3), [], 0, True),
    ("set", {3, 4}, [4, 3], [], 0, True),
    ("set", frozenset({3, 4}), [4, 3], [], 0, True),
    ("set", {3: 0, 4: 0}, [4, 3], [], 0, True),
    ("set", "ab", ["b", "a"], [], 0, True),
    ("set", [3], (4, 3), [], 0, False),
    ("set", None, (4, 3), [], 0, False),
    ("existence", object(), object(), [], 0, True),
    ("existence", None, object(), [], 0, False),
    ("existence", True, object(), [], 0, True),
    ("existence", False, None, [], 0, True),
    ("existence", 0, None, [], 0, False),
    ("root", -0.5, 99.0, [[1, 2]], 1e-4, True),  # 1 + 2x
    ("root", -0.4, -0.5, [[1, 2]], 1e-4, False),
    ("root", "x", -0.5, [[1, 2]], 1e-4, False),
    ("surface_area", 33, 33, [3, 4], 0, True),
    ("surface_area", 35, 33, [3, 4], 0, True),  # 9 + 2 * 3 * sqrt(1.5^2 + 4^2) = 34.6...
    ("surface_area", 34, 33, [3, 4], 0, False),
    ("digit_distance", 1, 1, [1, 2], 0, True),
    ("digit_distance", 6, 1, [23, 56], 0, True),
    ("digit_distance", 7, 1, [123, 256], 0, True),
    ("digit_distance", 8, 1, [23, 56], 0, False),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_what_counts_as_expected(case: tuple[str, Any, Any, Any, float, bool]) -> None:
    comparison, output, expected, arguments, tolerance, answer = case
    found = is_expected(comparison, crossed(output), crossed(expected), crossed(arguments), tolerance)
    assert found is answer


def test_types_that_the_files_lost_are_restored() -> None:
    def arguments(number: int, given: list[Any]) -> Any:
        record = {
            "entry_point": "f",
            "canonical_solution": "",
            "base_input": [given],
            "plus_input": {},
            "atol": 0,
        }
        return decode(mbpp_reference({**record, "task_id": f"Mbpp/{number}"})["inputs"][0])

    assert arguments(1, [[1, [2]], 3]) == [[1, [2]], 3]
    assert arguments(2, [[1], [2]]) == [(1,), (2,)]
    assert arguments(63, [[[1, 2], [3, 4]]]) == [[(1, 2), (3, 4)]]
    assert arguments(106, [[1], [2]]) == [[1], (2,)]
    assert arguments(115, [[[1], []]]) == [[{1}, {}]]
    assert arguments(124, [0, "1j"]) == [0.0, 1j]
    assert arguments(259, [[[1, 2]], [[3, 4]]]) == [((1, 2),), ((3, 4),)]
    assert arguments(722, [{"a": [1, 2]}, 3]) == [{"a": (1, 2)}, 3]
    assert arguments(615, [[[1, [2]]]]) == [((1, (2,)),)]


def test_tests_that_call_another_function_are_refused() -> None:
    with pytest.raises(UsageError, match="problem 7: its first test calls no function that its code defines"):
        mbpp_reference({"task_id": 7, "code": "def f(): pass", "test_list": ["assert g() == 1"]})


def test_filters_exist_for_the_machines_that_are_known_and_no_other() -> None:
    for column, machine in enumerate(("x86_64", "aarch64")):
        numbers = [numbers[column] for numbers in ALLOWED.values() if numbers[column] is not None]
        assert len(set(numbers)) == len(numbers)
        assert len(syscall_filter(machine)) % 8 == 0
    with pytest.raises(OSError, match="no list of system calls for riscv64"):
        syscall_filter("riscv64")
