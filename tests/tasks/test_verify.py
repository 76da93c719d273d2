"""The verifier against a table of what responses look like, meant well or not."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprior.tasks.canonical import canonical_answer
from rlprior.tasks.problem import Problem, Status
from rlprior.tasks.verify import MAX_READ_CHARACTERS, extract_answer, verify


def problem(answer: str) -> Problem:
    return Problem(
        id="0", task="t", difficulty=1, prompt="Q: ?\nA:", solution=f" #### {answer}", answer=answer
    )


RIGHT, WRONG, NONE = Status.CORRECT, Status.WRONG, Status.UNPARSABLE

TABLE = [
    # plain markers
    ("85", " 7+8=15, 3+4+1=8 #### 85", RIGHT),
    ("85", "####85", RIGHT),
    ("85", "#### 58", WRONG),
    ("85", "#### 8 5", WRONG),
    ("85", "#### 851", WRONG),
    ("85", "85", NONE),
    ("85", "", NONE),
    ("85", "####", NONE),
    ("85", "#### \n85", NONE),
    ("85", "### 85", NONE),
    ("85", "the answer is 85", RIGHT),
    ("85", "So the final answer is: 85.", RIGHT),
    ("85", "The Answer Is 85, obviously", WRONG),
    ("3.5", "The answer is 3.5. It took a while.", RIGHT),
    ("85", "The answer is therefore 85.", RIGHT),
    ("85", r"\boxed{85}", RIGHT),
    ("85", r"\boxed {85}", RIGHT),
    ("85", r"$\boxed{85}$", RIGHT),
    ("85", r"\boxed{}", NONE),
    ("85", r"\boxed{85", NONE),
    ("85", r"\boxed85", NONE),
    # order of the markers, and the last of each
    ("2", "#### 1\n#### 2", RIGHT),
    ("1", "#### 1\n#### 2", WRONG),
    ("3", r"The answer is 1 #### 2 \boxed{3}", RIGHT),
    ("3", r"\boxed{3} the answer is 1 #### 2", RIGHT),
    ("1", "#### 2 the answer is 1", RIGHT),
    ("2", "the answer is 1\n#### 2", WRONG),
    ("2", r"\boxed{1} no, \boxed{2}", RIGHT),
    ("2", r"\boxed{\boxed{2}}", RIGHT),
    ("1", r"\boxed{1} or \boxed{2", RIGHT),
    ("5", "The answer is\n#### 5", RIGHT),
    # numbers in other clothes
    ("1200", "#### 1,200", RIGHT),
    ("1200", "#### $1,200.00", RIGHT),
    ("1200", r"\boxed{1{,}200}", RIGHT),
    ("1200", r"\boxed{\$1\,200}", RIGHT),
    ("12", "#### 1,2", WRONG),
    ("0.5", "#### 1/2", RIGHT),
    ("0.5", r"\boxed{\frac{1}{2}}", RIGHT),
    ("0.5", r"\boxed{\dfrac12}", RIGHT),
    ("-0.5", r"\boxed{-\frac{1}{2}}", RIGHT),
    ("0.5", "#### .50", RIGHT),
    ("1/3", "#### 2/6", RIGHT),
    ("1/3", "#### 0.333333333333", WRONG),
    ("50", "#### 50%", RIGHT),
    ("50", r"\boxed{50\%}", RIGHT),
    ("7", "#### 007", RIGHT),
    ("7", "#### +7.", RIGHT),
    ("0", "#### -0", RIGHT),
    ("-15", "#### \u221215", RIGHT),
    ("-15", "#### - 15", RIGHT),
    ("4", "x = 4 #### x = 4", RIGHT),
    ("120", "the answer is 15 * 8 = 120 pints", RIGHT),
    ("4", "#### x >= 4", WRONG),
    ("72", "#### 72 clips", RIGHT),
    ("72", r"\boxed{72\text{ clips}}", RIGHT),
    ("72", "#### **72**", RIGHT),
    ("72", "the answer is **72** clips", RIGHT),
    ("23", "#### 2**3", WRONG),
    ("9999", "#### 9**9**9**9", WRONG),
    ("72", r"the answer is \(72\).", RIGHT),
    # hedging, towers and other attacks
    ("5", "#### 5 or 7", WRONG),
    ("5", "#### 5 or seven", WRONG),
    ("5", "#### 5, 6, 7", WRONG),
    ("3", "#### 3 and a half", WRONG),
    ("2", "#### 2 million", WRONG),
    ("8", "#### 5+3", WRONG),
    ("8", "#### 2^3", WRONG),
    ("120", "#### 5!", WRONG),
    ("5", "#### 5!", WRONG),
    ("1", "#### 9**9**9**9", WRONG),
    ("1", "#### 10000000!", WRONG),
    ("100", "#### 1e2", WRONG),
    ("1", "#### 1/0", WRONG),
    ("1", r"\boxed{\frac{1}{0}}", WRONG),
    ("1", "#### 1/1/1", WRONG),
    ("1", "#### nan", WRONG),
    ("1", "#### inf", WRONG),
    ("5", "#### \uff15", WRONG),
    ("5", "#### \u0665", WRONG),
    ("5", "#### --5", WRONG),
    ("5", "#### 5\x00", WRONG),
    ("5", r"\boxed{" + "{" * 900 + "5", NONE),
    ("1", "#### " + "9" * 1900, WRONG),
    ("5", "#### 5" + " " * MAX_READ_CHARACTERS, NONE),
    ("5", "x" * 10**6 + "#### 5", RIGHT),
    # text
    ("yes", "#### Yes.", RIGHT),
    ("(3,4)", r"\boxed{(3, 4)}", RIGHT),
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\dfrac{\sqrt{3}}{2}}", RIGHT),
    ("apples", r"\boxed{\text{Apples}}", RIGHT),
    ("yes", "#### no", WRONG),
]


CHOICES = ("a marsh", "4", r"$\frac{1}{2}$", "B and C")
CHOICE_TABLE = [
    ("#### B", RIGHT),
    ("#### (B)", RIGHT),
    ("#### b.", RIGHT),
    ("#### A", WRONG),
    ("#### D", WRONG),
    (r"\boxed{B}", RIGHT),
    (r"\boxed{\text{(B)}}", RIGHT),
    ("The answer is **B**.", RIGHT),
    ("The answer is option B", RIGHT),
    ("The answer is (B) 4.", RIGHT),
    ("The answer is: B: 4", RIGHT),
    ("the answer is (B) 5", NONE),
    ("the answer is a marsh", NONE),
    ("the answer is A. a marsh", WRONG),
    (r"#### C) 1/2", WRONG),
    (r"\boxed{C. $\frac12$}", WRONG),
    ("I think B", NONE),
    # not an answer: two letters, no letter of a choice, the choice's words alone, a number
    ("#### B or C", NONE),
    ("#### BC", NONE),
    ("#### B, C", NONE),
    ("#### E", NONE),
    ("#### 4", NONE),
    ("#### 2", NONE),
    ("#### \u0412", NONE),
    ("####", NONE),
    ("", NONE),
    # a marker without a letter leaves the next one its say
    ("The answer is 4 #### B", RIGHT),
    (r"\boxed{4} #### B", RIGHT),
]


@pytest.mark.parametrize(("response", "status"), CHOICE_TABLE)
def test_multiple_choice_is_by_letter(response: str, status: Status) -> None:
    one = replace(problem("B"), choices=CHOICES)
    verdict = verify(one, response)
    assert verdict.status is status
    assert (verdict.extracted is None) == (status is NONE)
    expected = Status.TRUNCATED if status is NONE else status
    assert verify(one, response + "\n", truncated=True).status is expected


@pytest.mark.parametrize("response", [" B", "B\n", " (B) 4"])
def test_a_letter_may_be_the_whole_response(response: str) -> None:
    """As after a prompt that ends in "A:"; of a response that was cut nobody knows the whole."""
    one = replace(problem("B"), choices=CHOICES)
    assert verify(one, response).status is Status.CORRECT
    assert verify(one, response, truncated=True).status is Status.TRUNCATED


def test_a_letter_that_was_cut_after_was_not_finished() -> None:
    one = replace(problem("B"), choices=CHOICES)
    assert verify(one, "#### B", truncated=True).status is Status.TRUNCATED


@pytest.mark.parametrize(("answer", "response", "status"), TABLE)
def test_table(answer: str, response: str, status: Status) -> None:
    assert verify(problem(answer), response).status is status


@pytest.mark.parametrize(("answer", "response", "status"), TABLE)
def test_a_cut_response_is_truncated_only_without_an_answer(
    answer: str, response: str, status: Status
) -> None:
    expected = Status.TRUNCATED if status is NONE else status
    # the line break shows that the answer was finished
    assert verify(problem(answer), response + "\n", truncated=True).status is expected


def test_extracted_is_none_exactly_without_a_verdict_on_an_answer() -> None:
    for answer, response, status in TABLE:
        assert (verify(problem(answer), response).extracted is None) == (status is NONE)


@given(st.fractions(max_denominator=10**6), st.integers(1, 50))
def test_equal_numbers_have_one_canonical_form(value: Fraction, factor: int) -> None:
    spellings = [
        f"{value.numerator}/{value.denominator}",
        f"{value.numerator * factor}/{value.denominator * factor}",
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
        f" ${value.numerator} / {value.denominator}$ ",
    ]
    assert {canonical_answer(text) for text in spellings} == {canonical_answer(str(value))}
    assert Fraction(canonical_answer(str(value))) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_decimals_are_compared_exactly(numerator: int, places: int) -> None:
    value = Fraction(numerator, 10**places)
    sign, digits = ("-" if numerator < 0 else ""), str(abs(numerator)).rjust(places + 1, "0")
    decimal = f"{sign}{digits[: len(digits) - places]}.{digits[len(digits) - places :]}00"
    assert canonical_answer(decimal) == canonical_answer(str(value))
    assert canonical_answer(f"{value.numerator + 1}/{value.denominator}") != canonical_answer(decimal)


@given(st.text())
def test_canonical_form_of_any_text_is_trimmed_and_folded(text: str) -> None:
    canonical = canonical_answer(text)
    assert canonical == " ".join(canonical.casefold().split())


def test_a_number_of_any_length_is_text_once_it_is_no_answer() -> None:
    # Python refuses to convert more than 4300 digits; nobody's answer has more than 100 characters.
    assert canonical_answer("9" * 5000) == "9" * 5000


@given(st.text(alphabet="\\boxed{}#the answer is 0123456789./,=$%-x\n", max_size=300))
def test_no_response_raises(text: str) -> None:
    verdict = verify(problem("5"), text)
    assert (verdict.extracted is None) == (verdict.status is Status.UNPARSABLE)


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed{",
        "the answer is ",
        "####",
        "{",
        "}",
        "1,",
        "1 ",
        "a ",
        "-",
        r"\text{",
        r"\frac{",
        "=",
        ". ",
        "9",
        "\t",
        r"\boxed{1}, ",
        r"\boxed{1} or $",
        r"\text{a}",
        r"\text{ ",
        "1 1/2 ",
        "x = 1 or ",
        "1, ",
        r"\pm",
        "$",
    ],
)
def test_no_repetition_makes_it_slow(unit: str) -> None:
    response = "#### " + unit * (MAX_READ_CHARACTERS // len(unit))
    start = time.perf_counter()
    for text in (
        response,
        response[:1900] + "!",
        r"\boxed{" + response[:1500] + "}",
        "the answer is " + response,
    ):
        extract_answer(text)
    # Four responses take about a millisecond; a regular expression that backtracks takes seconds.
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("response", "status"),
    [
        (" 3+5 #### 8", Status.TRUNCATED),
        (" the answer is 8", Status.TRUNCATED),
        (" #### 8\nQ", Status.CORRECT),
        (r" \boxed{8}", Status.CORRECT),
        (" #### 9\n", Status.WRONG),
    ],
)
def test_a_cut_response_is_graded_only_if_its_answer_was_finished(response: str, status: Status) -> None:
    problem = Problem(id="", task="", difficulty=1, prompt="Q: 3+5\nA:", solution=" #### 8", answer="8")
    assert verify(problem, response, truncated=True).status is status
