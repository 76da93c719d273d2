"""Seven families of questions with worked solutions, each step small enough to be done at once.

Every function poses one question from its numbers, or returns None where the numbers make none (equal numbers have no larger
one). Digits are meant to be single tokens, so column arithmetic prints units first and carries in the open.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

NAMES = ("Ana", "Ben", "Eva", "Leo", "Mia", "Tom")
THINGS = ("apples", "books", "cards", "coins", "pens", "stones")


@dataclass(frozen=True)
class Question:
    """A question and its worked answer.

    Attributes:
        canonical: equal for two questions that are the same problem in other words or order.
        text: as printed.
        steps: the working, comma-separated, each step true on its own.
        answer: canonical answer.
    """

    canonical: str
    text: str
    steps: str
    answer: str


def _digit(number: int, place: int) -> int:
    return number // 10**place % 10


def _signed(number: int) -> str:
    """`+5` or `-5`, and nothing for zero."""
    return f"{number:+d}" if number else ""


def addition(a: int, b: int) -> Question:
    """Column addition.

    >>> addition(37, 48).steps
    '7+8=15, 3+4+1=8'
    """
    steps: list[str] = []
    carry = 0
    for place in range(len(str(max(a, b)))):
        x, y = _digit(a, place), _digit(b, place)
        total = x + y + carry
        steps.append(f"{x}+{y}{_signed(carry)}={total}")
        carry = total // 10
    return Question(f"{min(a, b)}+{max(a, b)}", f"{a}+{b}", ", ".join(steps), str(a + b))


def subtraction(a: int, b: int) -> Question:
    """Column subtraction of the smaller number from the larger one.

    >>> subtraction(52, 37).steps
    '12-7=5, 5-3-1=1'
    """
    a, b = max(a, b), min(a, b)
    steps: list[str] = []
    borrow = 0
    for place in range(len(str(a))):
        x, y = _digit(a, place), _digit(b, place)
        if x < y + borrow:
            x += 10
        steps.append(f"{x}-{y}{_signed(-borrow)}={x - y - borrow}")
        borrow = x // 10
    return Question(f"{a}-{b}", f"{a}-{b}", ", ".join(steps), str(a - b))


def multiplication(a: int, b: int) -> Question:
    """Column multiplication by a digit, and partial products by more.

    >>> multiplication(47, 6).steps, multiplication(47, 36).steps
    ('7*6=42, 4*6+4=28', '47*6=282, 47*30=1410, 282+1410=1692')
    """
    steps: list[str] = []
    if b < 10:
        carry = 0
        for place in range(len(str(a))):
            total = _digit(a, place) * b + carry
            steps.append(f"{_digit(a, place)}*{b}{_signed(carry)}={total}")
            carry = total // 10
    else:
        parts = [_digit(b, place) * 10**place for place in range(len(str(b))) if _digit(b, place)]
        steps += [f"{a}*{part}={a * part}" for part in parts]
        if len(parts) > 1:
            steps.append(f"{'+'.join(str(a * part) for part in parts)}={a * b}")
    return Question(f"{min(a, b)}*{max(a, b)}", f"{a}*{b}", ", ".join(steps), str(a * b))


def shift_equation(x: int, b: int) -> Question:
    """`x+b=c`.

    >>> shift_equation(7, 5)
    Question(canonical='x+5=12', text='x+5=12', steps='x=12-5=7', answer='7')
    """
    text = f"x{_signed(b)}={x + b}"
    return Question(text, text, f"x={x + b}{_signed(-b)}={x}", str(x))


def scaled_equation(x: int, a: int, b: int) -> Question:
    """`ax+b=c`.

    >>> scaled_equation(-5, 3, -5)
    Question(canonical='3x-5=-20', text='3x-5=-20', steps='3x=-20+5=-15, x=-15/3=-5', answer='-5')
    """
    text = f"{a}x{_signed(b)}={a * x + b}"
    steps = f"{a}x={a * x + b}{_signed(-b)}={a * x}, x={a * x}/{a}={x}"
    return Question(text, text, steps, str(x))


def two_sided_equation(x: int, a: int, c: int, b: int) -> Question:
    """`(a+c)x+b=cx+d`.

    >>> two_sided_equation(3, 5, 2, 3)
    Question(canonical='7x+3=2x+18', text='7x+3=2x+18', steps='5x=18-3=15, x=15/5=3', answer='3')
    """
    text = f"{a + c}x{_signed(b)}={c}x{_signed(a * x + b)}"
    steps = f"{a}x={a * x + b}{_signed(-b)}={a * x}, x={a * x}/{a}={x}"
    return Question(text, text, steps, str(x))


def one_step_story(kind: int, a: int, b: int, name: int, thing: int) -> Question:
    """Gain or loss in one step."""
    who, what = NAMES[name], THINGS[thing]
    if kind == 0:
        text = f"{who} has {a} {what} and gets {b} more. How many {what} now?"
        return Question(f"gain {min(a, b)} {max(a, b)}", text, f"{a}+{b}={a + b}", str(a + b))
    text = f"{who} has {a + b} {what} and loses {b}. How many {what} now?"
    return Question(f"lose {a + b} {b}", text, f"{a + b}-{b}={a}", str(a))


def two_step_story(kind: int, a: int, b: int, c: int, name: int, thing: int) -> Question:
    """Gain then loss, or loss then gain."""
    who, what = NAMES[name], THINGS[thing]
    if kind == 0:
        text = f"{who} has {a} {what}, gets {b} more and loses {c}. How many {what} now?"
        steps = f"{a}+{b}={a + b}, {a + b}-{c}={a + b - c}"
        return Question(f"gain-lose {min(a, b)} {max(a, b)} {c}", text, steps, str(a + b - c))
    text = f"{who} has {a + c} {what}, loses {c} and gets {b} more. How many {what} now?"
    steps = f"{a + c}-{c}={a}, {a}+{b}={a + b}"
    return Question(f"lose-gain {a + c} {c} {b}", text, steps, str(a + b))


def box_story(kind: int, a: int, b: int, c: int, name: int, thing: int) -> Question:
    """A product, then a gain or a loss."""
    who, what = NAMES[name], THINGS[thing]
    boxes = f"{who} has {a} boxes of {b} {what}"
    if kind == 0:
        text, sign, end = f"{boxes} and {c} more. How many {what}?", "+", a * b + c
    else:
        text, sign, end = f"{boxes} and loses {c}. How many {what} are left?", "-", a * b - c
    canonical = f"boxes {min(a, b)} {max(a, b)} {sign}{c}"
    return Question(canonical, text, f"{a}*{b}={a * b}, {a * b}{sign}{c}={end}", str(end))


def sharing_story(kind: int, a: int, b: int, c: int, d: int, name: int, thing: int) -> Question:
    """Two products added, or two products and an equal share of what they make."""
    who, what = NAMES[name], THINGS[thing]
    if kind == 0:
        text = f"{who} has {a} boxes of {b} {what} and {c} bags of {d} {what}. How many {what}?"
        end = a * b + c * d
        steps = f"{a}*{b}={a * b}, {c}*{d}={c * d}, {a * b}+{c * d}={end}"
        products = sorted((sorted((a, b)), sorted((c, d))))
        return Question(f"boxes-bags {products}", text, steps, str(end))
    # b*c things a box, so that the c friends can share them evenly; d more are found by each.
    text = (
        f"{who} has {a} boxes of {b * c} {what} and shares them among {c} friends. "
        f"Each friend finds {d} more. How many {what} has each?"
    )
    total, share = a * b * c, a * b
    steps = f"{a}*{b * c}={total}, {total}/{c}={share}, {share}+{d}={share + d}"
    return Question(f"share {a} {b * c} {c} {d}", text, steps, str(share + d))


def compare_integers(prefix: int, a: int, b: int) -> Question | None:
    """Larger of two integers of equal length, digit by digit.

    >>> compare_integers(47, 38, 52).steps
    '4=4, 7=7, 3<5'
    """
    if a == b:
        return None
    left, right = str(100 * prefix + a), str(100 * prefix + b)
    steps: list[str] = []
    for x, y in zip(left, right, strict=True):
        steps.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
        if x != y:
            break
    low, high = sorted((int(left), int(right)))
    return Question(f"larger {low} {high}", f"larger of {left} and {right}", ", ".join(steps), str(high))


def compare_decimals(whole: int, tenths: int, hundredths: int, flip: int) -> Question | None:
    """Larger of a decimal with one place and one with two.

    >>> compare_decimals(3, 2, 15, 0)
    Question(canonical='larger 3.2 3.15', text='larger of 3.2 and 3.15', steps='3.20>3.15', answer='3.2')
    """
    if hundredths % 10 == 0:
        return None
    short, long = f"{whole}.{tenths}", f"{whole}.{hundredths:02d}"
    larger = short if 10 * tenths > hundredths else long
    left, right = (long, short) if flip else (short, long)
    sign = "<" if larger == right else ">"
    text = f"larger of {left} and {right}"
    return Question(f"larger {short} {long}", text, f"{left:0<4}{sign}{right:0<4}", larger)


def compare_fractions(a: int, b: int, c: int, d: int) -> Question | None:
    """Larger of two reduced proper fractions whose decimals do not end, by cross-multiplication.

    >>> compare_fractions(3, 7, 4, 9).steps
    '3*9=27, 4*7=28, 27<28'
    """
    left, right = Fraction(a, b), Fraction(c, d)
    if a >= b or c >= d or left == right or math.gcd(a, b) > 1 or math.gcd(c, d) > 1:
        return None
    one, two = a * d, c * b
    steps = f"{a}*{d}={one}, {c}*{b}={two}, {one}{'<' if one < two else '>'}{two}"
    low, high = sorted((left, right))
    return Question(f"larger {low} {high}", f"larger of {left} and {right}", steps, str(high))


def arithmetic_sequence(start: int, step: int) -> Question:
    """Next term of a sequence with a constant difference.

    >>> arithmetic_sequence(3, 4)
    Question(canonical='3, 7, 11, 15, ?', text='3, 7, 11, 15, ?', steps='7-3=4, 15+4=19', answer='19')
    """
    terms = [start + i * step for i in range(5)]
    text = ", ".join(map(str, terms[:4])) + ", ?"
    steps = f"{terms[1]}-{terms[0]}={step}, {terms[3]}{_signed(step)}={terms[4]}"
    return Question(text, text, steps, str(terms[4]))


def geometric_sequence(start: int, ratio: int) -> Question:
    """Next term of a sequence with a constant ratio.

    >>> geometric_sequence(2, 3)
    Question(canonical='2, 6, 18, ?', text='2, 6, 18, ?', steps='6/2=3, 18*3=54', answer='54')
    """
    terms = [start * ratio**i for i in range(4)]
    text = ", ".join(map(str, terms[:3])) + ", ?"
    steps = f"{terms[1]}/{terms[0]}={ratio}, {terms[2]}*{ratio}={terms[3]}"
    return Question(text, text, steps, str(terms[3]))


def quadratic_sequence(start: int, step: int, growth: int) -> Question:
    """Next term of a sequence whose differences grow by a constant.

    >>> quadratic_sequence(1, 1, 2)
    Question(canonical='1, 2, 5, 10, ?', text='1, 2, 5, 10, ?', steps='2-1=1, 5-2=3, 10-5=5, 5+2=7, 10+7=17', answer='17')
    """
    steps: list[str] = []
    terms = [start]
    for i in range(4):
        terms.append(terms[-1] + step + i * growth)
    for before, after in itertools.pairwise(terms[:4]):
        steps.append(f"{after}-{before}={after - before}")
    last = terms[3] - terms[2]
    steps += [f"{last}+{growth}={last + growth}", f"{terms[3]}+{last + growth}={terms[4]}"]
    text = ", ".join(map(str, terms[:4])) + ", ?"
    return Question(text, text, ", ".join(steps), str(terms[4]))
