"""One spelling for each answer: numbers as exact fractions, everything else as normalised text.

Nothing is evaluated: a number is a literal, a decimal, a mixed number or one fraction of two literals, so no answer can make it slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

MAX_NUMBER_CHARACTERS = 100

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})?(?:\.(?P<decimals>[0-9]*))?")
_LATEX_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*\\frac\s*(?:\{(?P<a>[^{}]*)\}|(?P<c>[0-9]))\s*(?:\{(?P<b>[^{}]*)\}|(?P<d>[0-9]))"
)
_MIXED = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})(?P<fraction>\s+[0-9]+\s*/\s*[0-9]+|\s*\\frac.*)", re.DOTALL
)
# "72 clips" states 72; "5 or 7", "3 and a half", "2 million" and "5 squared" do not state their first number.
_NOT_UNITS = re.compile(
    r"\b(?:or|and|to|plus|minus|times|over|below|negative|not|out|under|gross|score|lakhs?|crores?|squared|cubed|factorial|tens|half|halves|thirds?|[ap]\.?m"
    r"|(?:dozen|hundred|thousand|[mbtr]+illion)(?:th)?s?|(?:quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth)s?)\b",
    re.IGNORECASE,
)
_WITH_UNIT = re.compile(
    r"(?P<number>[^\sa-zA-Z]+(?:\s[^\sa-zA-Z]+)?)\s+(?P<unit>[a-zA-Z'-]{2,}(?:\s+[a-zA-Z'-]{2,}){0,2})"
)
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
# at the end, to the second or third power or not; one letter of these is a variable or a constant
_UNIT_COMMAND = re.compile(
    r"(?<=\S)\s*\\(?:text|mathrm|textrm|mbox)\s*\{(?P<unit>(?!\s*[eijxyz]\s*\})[^{}]*)\}(?:\s*\^\s*(?:[23]|\{[23]\}))?[\s.]*$"
)
_LABEL_COMMAND = re.compile(r"^\s*\\(?:text|mathrm|textrm|mbox)\s*\{[A-Za-z\s]*:\s*\}")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_SEPARATOR_COMMAND = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{(\s*(?:,?\s*(?:or|and)|,|;)\s*)\}")
_SEPARATORS = re.compile(
    r"(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<separator>(?:(?<![0-9]),|,(?![0-9]{3}(?![0-9]))|;|\b(?:or|and)\b))"
)
_SET = re.compile(r"(?:[A-Za-z]\s*(?:\\in|=)\s*)?\\\{(?P<members>.*)\\\}", re.DOTALL)
_ONE_IN_BRACES = re.compile(r"(\\sqrt(?=\s*\{\s*[0-9])|[_^])\s*\{\s*([0-9a-z])\s*\}")
_PUNCTUATION = re.compile(r"\s*([^\w\s])\s*")
_NOISE = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\\[!,;:()\[\]]|\\?[$%]|(?<![\w)])\*\*|\*\*(?![\w(])"
    r"|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\u00b0"
)
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        ("\u2212", "-"),
        (r"\{,\}", ","),
        ("[\u00a0\u2009\u202f~]|" + r"(?<!\\)\\ ", " "),
        (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\leq(?:slant)?(?![a-zA-Z])|" + "\u2264", r"\\le "),
        (r"\\geq(?:slant)?(?![a-zA-Z])|" + "\u2265", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|" + "\u2260", r"\\ne "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        ("\u03c0", r"\\pi "),
        ("\u221e", r"\\infty "),
    )
]


def canonical_answer(text: str) -> str:
    r"""One spelling per answer: integers, terminating decimals and reduced fractions; other text normalised.

    Currency, percent and degree signs, thousands separators, units after a number, what leads up to the last `=` of one answer, and LaTeX
    spacing are dropped.

    >>> [canonical_answer(text) for text in ("$1,200.50", r"\frac{2}{6}", "x = 4/8", "72 clips", "2 1/2", " Yes. ")]
    ['1200.5', '1/3', '0.5', '72', '2.5', 'yes']
    """
    bare = _LABEL_COMMAND.sub("", respell(text))
    unit = _UNIT_COMMAND.search(bare)
    if unit and not states_other_amount(unit["unit"]):
        bare = bare[: unit.start()]
    bare = remove_markup(bare).rstrip(".,;: ")
    bare = _right_side(bare).strip()
    value = parse_number(bare)
    if value is None and (match := _WITH_UNIT.fullmatch(bare)) and not states_other_amount(match["unit"]):
        value = parse_number(match["number"])
    if value is not None:
        return _number_text(value)
    return " ".join(_PUNCTUATION.sub(r"\1", _ONE_IN_BRACES.sub(r"\1\2", bare.casefold())).split())


def canonical_answers(texts: Iterable[str]) -> str:
    r"""One spelling of several answers that belong together, in any order.

    >>> canonical_answers(split_answers(r"x = 5 \text{ or } x = 2")), canonical_answers(["2.0", "5"])
    ('2, 5', '2, 5')
    """
    signed = [
        text.replace(r"\pm", sign)
        for text in texts
        for sign in (("+", "-") if text.count(r"\pm") == 1 else (r"\pm",))
    ]
    return ", ".join(sorted({canonical_answer(text) for text in signed}))


def split_answers(text: str) -> list[str]:
    r"""The answers that a text lists: the members of a set in braces, or what commas, semicolons, "or" and "and" separate outside brackets.

    The comma of `1,000` is part of a number.

    >>> split_answers(r"\{(1, 2), [3, 4)\}"), split_answers("5 and 1,000")
    (['(1, 2)', '[3, 4)'], ['5', '1,000'])
    """
    text = _NOISE.sub("", _SEPARATOR_COMMAND.sub(r" \1 ", respell(text))).strip()
    if match := _SET.fullmatch(text):
        text = match["members"]
    parts, start, depth = [], 0, 0
    for match in _SEPARATORS.finditer(text):
        if match["separator"] is None:
            depth = max(0, depth + (1 if match["open"] else -1))
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def remove_markup(text: str) -> str:
    """A text without signs of markup, currency, percent and degrees; of `\\text{...}` the content."""
    return _NOISE.sub("", _TEXT_COMMAND.sub(r"\1", text)).strip()


def states_other_amount(unit: str) -> bool:
    """Whether the words after a number say that it is not the amount: "5 thousand", "5 or more", "5 squared".

    >>> states_other_amount("thousand"), states_other_amount("clips")
    (True, False)
    """
    return bool(_NOT_UNITS.search(unit))


def respell(text: str) -> str:
    """The same text with one spelling for each symbol that has several."""
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def is_number(text: str) -> bool:
    """Whether a whole text is one number.

    >>> is_number("27.0"), is_number("27 or 28")
    (True, False)
    """
    return parse_number(_NOISE.sub("", text).strip()) is not None


def parse_number(text: str) -> Fraction | None:
    """Value of a literal, a decimal, `a/b`, `\\frac{a}{b}` or a mixed number; None for anything else, however close."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    if (match := _MIXED.fullmatch(text)) and (part := _parse_fraction(match["fraction"].strip())):
        whole = _parse_decimal(match["whole"])
        if whole is not None and 0 < part < 1:
            return (whole + part) * (-1 if match["sign"] == "-" else 1)
    return _parse_fraction(text)


def _parse_fraction(text: str) -> Fraction | None:
    if match := _LATEX_FRACTION.fullmatch(text):
        parts = (match["a"] or match["c"] or "", match["b"] or match["d"] or "")
        sign = -1 if match["sign"] == "-" else 1
    else:
        above, slash, below = text.partition("/")
        if not slash:
            return _parse_decimal(text)
        parts, sign = (above, below), 1
    numerator, denominator = (_parse_decimal(part.strip()) for part in parts)
    if numerator is None or denominator is None or denominator == 0:
        return None
    return sign * numerator / denominator


def _parse_decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if not match or not (match["whole"] or match["decimals"]):
        return None
    decimals = match["decimals"] or ""
    digits = (match["whole"] or "").replace(",", "") + decimals
    value = Fraction(int(digits), 10 ** len(decimals))
    return -value if match["sign"] == "-" else value


def _number_text(value: Fraction) -> str:
    rest, num_twos, num_fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, num_twos = rest // 2, num_twos + 1
    while rest % 5 == 0:
        rest, num_fives = rest // 5, num_fives + 1
    if rest != 1 or value.denominator == 1:
        return str(value)
    places = max(num_twos, num_fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _right_side(text: str) -> str:
    """What follows the last `=`, unless something before it is an answer of its own, as in `x = 3 or x = 5`."""
    left, right = _split_at_last_equals(text)
    is_one = all(not re.search(r"[0-9=]", part) for part in split_answers(left)[:-1])
    return right if is_one else text


def _split_at_last_equals(text: str) -> tuple[str, str]:
    start, end = 0, 0
    for match in _EQUALS.finditer(text):
        start, end = match.span()
    return text[:start], text[end:]
