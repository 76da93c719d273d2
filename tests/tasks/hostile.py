"""Responses that would hang, crash or fill whoever evaluates them, drawn from families by seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from rlprior.tasks.problem import Problem

GOLD_ANSWERS = (
    "5",
    r"\frac{1}{3}",
    "x^2+2x+1",
    r"\frac{\sqrt{3}}{2}",
    "[1,2)",
    r"\{1,2,3\}",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"\text{yes}",
    r"\sin(x)^2",
    "x=5",
)
"""One of each kind that a computer algebra system compares in its own way."""


def boxed(text: str) -> str:
    return rf"so \boxed{{{text}}}."


def nest(opening: str, inside: str, closing: str, depth: int) -> str:
    return opening * depth + inside + closing * depth


def nesting(r: random.Random) -> str:
    opening, closing = r.choice(
        [
            ("(", ")"),
            ("{", "}"),
            ("[", "]"),
            (r"\sqrt{", "}"),
            (r"\frac{1}{1+", "}"),
            ("2^{", "}"),
            ("|", "|"),
            (r"\left(", r"\right)"),
            (r"\text{", "}"),
            (r"\log(", ")"),
            ("-(", ")"),
            (r"\boxed{", "}"),
            ("x_{", "}"),
        ]
    )
    return boxed(nest(opening, "1", closing, r.choice([3, 20, 100, 1900 // len(opening + closing)])))


def tower(r: random.Random) -> str:
    base, height = r.choice(["9", "2", "10", "1.1", "x", "-3", "i"]), r.randint(2, 9)
    power = r.choice([lambda: nest(f"{base}^{{", "9", "}", height), lambda: "**".join([base] * height)])
    return boxed(power())


def factorial(r: random.Random) -> str:
    number = r.choice(["10000000", "999999999", "(10^9)", "100!", "20000", "(9^{9^9})"])
    return boxed(
        r.choice(
            [
                f"{number}!",
                f"{number}!!",
                rf"\frac{{{number}!}}{{{number}!}}",
                rf"\binom{{{number}}}{{{7**9}}}",
            ]
        )
        + r.choice(["", "-1", "!!!!", rf"+\frac{{1}}{{{number}!}}"])
    )


def digits(r: random.Random) -> str:
    count = r.choice([1000, 1900, 4301, 10**6])
    return (
        r.choice(["", "#### ", "The answer is ", r"\boxed{"]) + "7" * count + r.choice(["", "}", ".5", "!"])
    )


def many_digits(r: random.Random) -> str:
    count = r.choice([100, 400, 900])
    return boxed(r.choice(["^", "*", "/", r"\cdot ", "e", "_", "."]).join(["7" * count, "9" * count]))


def control(r: random.Random) -> str:
    noise = "".join(chr(r.choice([*range(32), 127, *range(128, 160)])) for _ in range(r.choice([5, 300])))
    return r.choice(["#### 5", boxed("5" + noise), "the answer is " + noise]) + noise


def unclosed(r: random.Random) -> str:
    opening = r.choice([r"\boxed{", "{", r"\frac{", r"\sqrt[", r"\begin{pmatrix}", "$", "$$", r"\[", r"\("])
    inside = opening * r.choice([1, 10, 150])
    return r.choice(["#### " + inside + "5", boxed(inside + "5"), inside + "the answer is 5 " + inside])


def scripts(r: random.Random) -> str:
    alphabet = r.choice(
        [
            "٠١٢٣٤٥٦٧٨٩",
            "०१२३४५",
            "五十百千万億",
            "𝟓𝟔𝟕",
            "⅓½⁵₅",
            "абвгд",
            "\u200f\u202e\u2066\u20675",
            "e\u0301\u0300\u0327",
            "👩‍👩‍👧‍👦🏳️‍🌈",
        ]
    )
    text = "".join(r.choice(alphabet) for _ in range(r.choice([1, 8, 400])))
    return r.choice([boxed(text), "#### " + text, "the answer is " + text, boxed(text + "+5")])


def surrogates(r: random.Random) -> str:
    half = "".join(chr(r.randrange(0xD800, 0xE000)) for _ in range(r.choice([1, 50])))
    return r.choice([boxed(half), "#### 5" + half, boxed("5" + half + "\ufffd\ufeff\uffff\x00")])


def repetition(r: random.Random) -> str:
    units = [
        "1,",
        "1 ",
        "a ",
        "-",
        "=",
        ". ",
        "9",
        "\t",
        r"\text{a}",
        r"\frac12",
        r"\cdot",
        "$1$ ",
        r"\%",
        "1/",
        "5 or ",
        "x+",
    ]
    unit = r.choice(
        [*units, "and ", "(1,", "sin", r"\sqrt2", "1=", "<", r"\infty-", "0.", "''", r"\\", "&", "|"]
    )
    text = unit * (r.choice([60, 1800]) // len(unit))
    return r.choice(["#### " + text, boxed(text), boxed(text + "!"), "the answer is " + text])


def calculus(r: random.Random) -> str:
    f = r.choice(
        [
            r"\sin(x^x)",
            r"e^{-x^2}\ln(x)",
            r"\frac{1}{x^5+x+1}",
            r"\sqrt{\tan(x)}",
            "x^{x^x}",
            r"\frac{\sin x}{x}",
        ]
    )
    n = r.choice(["10^9", r"\infty", "100000", "9^{9^9}"])
    whole = r.choice(
        [
            rf"\int_0^{{{n}}} {f} dx",
            rf"\int {f} dx",
            rf"\sum_{{x=1}}^{{{n}}} {f}",
            rf"\prod_{{x=1}}^{{{n}}} {f}",
            rf"\lim_{{x \to {n}}} {f}",
            rf"\frac{{d}}{{dx}} {f}",
            nest(r"\int_0^1 ", f, " dx", r.randint(2, 30)),
        ]
    )
    return boxed(whole)


def algebra(r: random.Random) -> str:
    n = r.choice([50, 3000, 10**6, 10**12])
    return boxed(
        r.choice(
            [
                f"(x+1)^{{{n}}}",
                f"(x+y+z)^{{{n}}}-1",
                f"x^{{{n}}}=x+1",
                rf"\sqrt[{n}]{{{n}}}",
                rf"\sin({n}^{{{n}}})",
                rf"x^{{{n}}}-{n}x+1 < 0",
                rf"\log_{{{n}}}({n}!)",
                rf"{n}\pmod{{7}}",
                rf"\gcd({n},{n})",
                "0^0",
                "1/0",
                r"\infty-\infty",
                f"e^{{e^{{e^{{{n}}}}}}}",
                "+".join(rf"\sqrt{{{i}}}" for i in range(2, 120)),
                "".join(f"(x-{i})" for i in range(200)),
                "=".join("xyzabc" * 20),
                rf"\cos({n}x)+\sin({n}x)",
            ]
        )
    )


def matrix(r: random.Random) -> str:
    size = r.choice([2, 10, 25, 100])
    cell = r.choice(["1", "x", "{i}", "x^{i}", r"\frac{{1}}{{{i}}}"])
    rows = [" & ".join(cell.replace("{i}", str(i + j)) for j in range(size)) for i in range(size)]
    body = r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"
    return boxed(body + r.choice(["", "^{-1}", "^{1000}", r"\cdot " + body]))


def second_box(r: random.Random) -> str:
    gap = r.choice(["} or {", "}{", r"} \boxed{", r"\} \boxed{", "}" * 50, r"}$ $\boxed{"])
    return r.choice(["#### ", "The answer is "]) + f"4{gap}5"


FAMILIES: tuple[Callable[[random.Random], str], ...] = (
    *(nesting, tower, factorial, digits, many_digits, control, unclosed, scripts),
    *(surrogates, repetition, calculus, algebra, matrix, second_box),
)


def hostile_responses(count: int, seed: int) -> Iterator[tuple[Problem, str]]:
    """`count` problems, each with a response of the next family."""
    r = random.Random(seed)
    for number in range(count):
        answer = r.choice(GOLD_ANSWERS)
        problem = Problem(
            id=str(number),
            task="t",
            difficulty=0,
            prompt="Q: ?\nA:",
            solution="",
            answer=answer,
            written_answer=answer,
        )
        yield problem, FAMILIES[number % len(FAMILIES)](r)
