"""Verifiers of whole batches: what counts as equal, whose reward is paid, and what hostile responses cost."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tasks.hostile import FAMILIES, hostile_responses

from rlprior.config import RunError, UsageError, decode
from rlprior.rl.rollout import Group
from rlprior.sampling.grades import grade
from rlprior.sampling.store import Sample
from rlprior.study.plan import task_inputs
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.tasks.verifier import RULES, MathVerifier, RewardVerifier, Verifier, open_verifier
from rlprior.tasks.verify import verify

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


def problem(answer: str, number: int = 0, choices: tuple[str, ...] = ()) -> Problem:
    return Problem(
        id=str(number),
        task="t",
        difficulty=0,
        prompt=f"Q: {number}\nA:",
        solution="",
        answer=answer,
        choices=choices,
    )


@pytest.fixture(scope="module")
def math() -> Iterator[Verifier]:
    # the deadline is for the loaded machine that tests run on: a comparison takes milliseconds
    with open_verifier(TaskConfig(verifier="math", verifier_timeout_seconds=20.0), None) as verifier:
        yield verifier


RIGHT, WRONG = Status.CORRECT, Status.WRONG
EQUIVALENCES = [
    # what the rules decide
    ("0.5", r"\boxed{\frac{2}{4}}", RIGHT),
    ("5", "no idea", Status.UNPARSABLE),
    # numbers
    ("8", "#### 5+3", RIGHT),
    ("8", "#### 2^3", RIGHT),
    ("8", "#### 2**3", WRONG),
    ("120", "the answer is 5!", RIGHT),
    ("1/3", "#### 0.333333333333", RIGHT),
    ("1/3", "#### 0.33", WRONG),
    ("0.5", r"\boxed{50\%}", RIGHT),
    ("1000000", r"\boxed{10^{6}}", RIGHT),
    ("100000000", r"\boxed{100000001}", WRONG),
    ("1", r"\boxed{\frac{1}{0}}", WRONG),
    # expressions
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{3}/2}", RIGHT),
    (r"\frac{1}{\sqrt{2}}", r"\boxed{\frac{\sqrt2}{2}}", RIGHT),
    ("(x+1)^2", r"\boxed{x^2 + 2x + 1}", RIGHT),
    ("(x+1)^2", r"\boxed{x^2+2x-1}", WRONG),
    (r"2\pi", r"the answer is $\pi \cdot 2$.", RIGHT),
    ("3x", r"\boxed{3y}", WRONG),
    # an equation for a value, and the other way round
    ("x=5", r"\boxed{5}", RIGHT),
    ("5", r"\boxed{x = 5}", RIGHT),
    # sets, intervals, points, matrices
    (r"\{1,2\}", r"\boxed{\{2, 1\}}", RIGHT),
    ("1,2", r"\boxed{2 \text{ and } 1}", RIGHT),
    ("1,2", r"\boxed{1}", WRONG),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{(3,\infty)\cup(-\infty,2)}", RIGHT),
    ("(3,4)", r"\boxed{(4,3)}", WRONG),
    ("[1,2)", r"\boxed{[1,2]}", WRONG),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", RIGHT),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}}", WRONG),
    # several guesses are none
    ("5", "#### 5 or 7", WRONG),
    ("7", "#### 5 or 7", WRONG),
    ("7", r"\boxed{5\text{ or }7}", WRONG),
    ("7", r"#### 5} \boxed{7", WRONG),
    ("7", r"#### 5$ or $7", WRONG),
    # text is not algebra
    ("yes", r"\boxed{\text{no}}", WRONG),
    ("5", "the answer is the number 5", WRONG),
    # not symmetric: a relation for an interval is taken, an interval for a relation is not
    ("1<x<2", r"\boxed{(1,2)}", RIGHT),
    ("(1,2)", r"\boxed{1<x<2}", WRONG),
]


@needs_math_verify
def test_equivalences(math: Verifier) -> None:
    responses = [(problem(gold, n), text, False) for n, (gold, text, _) in enumerate(EQUIVALENCES)]
    statuses = [verdict.status for verdict in math.grade(responses)]
    assert dict(zip(EQUIVALENCES, statuses, strict=True)) == {row: row[2] for row in EQUIVALENCES}


@needs_math_verify
def test_math_reads_the_answer_as_it_was_written(math: Verifier) -> None:
    """In canonical form the rows of a matrix, for one, can no longer be told apart."""
    written = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
    gold = Problem(
        id="m", task="t", difficulty=0, prompt="", solution="", answer="canonical", written_answer=written
    )
    [verdict] = math.grade([(gold, r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", False)])
    assert verdict.status is RIGHT


class Recorder:
    """In place of the pool: remembers the pairs and answers as it is told."""

    def __init__(self, answers: list[bool | Status]) -> None:
        self.asked: list[list[str]] = []
        self.answers = answers

    def map(self, pairs: list[list[str]]) -> list[bool | Status]:
        self.asked.extend(pairs)
        return [self.answers.pop(0) for _ in pairs]

    def verifier(self, *, merge_votes: bool = False) -> MathVerifier:
        return MathVerifier(self, timeout_seconds=1, merge_votes=merge_votes)  # pyright: ignore[reportArgumentType]


@needs_math_verify
def test_every_different_answer_reaches_math_verify_once() -> None:
    recorder = Recorder([True, True, Status.TIMED_OUT, Status.FAILED])
    verdicts = recorder.verifier().grade(
        [
            (problem("8"), "#### 8", False),
            (problem("8"), "#### 5 + 3", False),
            (problem("8"), "nothing", False),
            (problem("8"), "#### 5+3", False),  # the same answer: one comparison, one verdict
            (problem("8"), "#### 4+4", True),  # one more digit would change it
            (problem("8", 1), "#### 5+3", False),
            (problem("8", 1), "#### 6+2", False),
            (problem("B", 2, ("1", "2")), "#### A", False),
        ]
    )
    assert recorder.asked == [["8", "8"], ["8", "5 + 3"], ["8", "5+3"], ["8", "6+2"]]
    statuses = [
        RIGHT,
        RIGHT,
        Status.UNPARSABLE,
        RIGHT,
        Status.TRUNCATED,
        Status.TIMED_OUT,
        Status.FAILED,
        WRONG,
    ]
    assert [verdict.status for verdict in verdicts] == statuses
    assert [verdict.reward for verdict in verdicts] == [1, 1, 0, 1, 0, 0, 0, 0]
    assert verdicts[5].extracted == "5+3", "an answer that was not compared in time was still given"


TWO_GRADERS = [
    # response, what math-verify says, status, second status
    ("#### 8", True, RIGHT, RIGHT),
    ("#### 8", False, RIGHT, WRONG),
    ("#### 8", Status.TIMED_OUT, RIGHT, None),
    ("#### 8", Status.FAILED, RIGHT, None),
    ("#### 5+3", True, RIGHT, WRONG),
    ("#### 5+4", False, WRONG, WRONG),
    ("#### 5+3", Status.TIMED_OUT, Status.TIMED_OUT, None),
    ("#### 5+3", Status.FAILED, Status.FAILED, None),
    ("nothing", None, Status.UNPARSABLE, None),
    ("#### 5 3", None, WRONG, None),  # what it would misread it is not asked
]


@needs_math_verify
@pytest.mark.parametrize(("response", "says", "status", "second"), TWO_GRADERS)
def test_a_verdict_is_disputed_where_the_two_graders_differ(
    response: str, says: bool | Status | None, status: Status, second: Status | None
) -> None:
    recorder = Recorder([] if says is None else [says])
    [verdict] = recorder.verifier().grade([(problem("8"), response, False)])
    assert (verdict.status, verdict.second_status) == (status, second)
    [one] = grade(
        [
            Sample(
                problem_id="0",
                sample_index=0,
                token_ids=(),
                text=response,
                finish_reason="stop",
                log_prob_nats=0.0,
                num_tokens=0,
            )
        ],
        {"0": problem("8")},
        Recorder([] if says is None else [says]).verifier().grade,
    )
    rules = verify(problem("8"), response).status
    assert one.is_disputed == (isinstance(says, bool) and says != (rules is RIGHT))


@needs_math_verify
def test_rules_alone_and_choices_have_no_second_grader() -> None:
    assert RULES.grade([(problem("8"), "#### 8", False)])[0].second_status is None
    recorder = Recorder([])
    [verdict] = recorder.verifier().grade([(problem("B", 0, ("1", "2")), "#### B", False)])
    assert (verdict.status, verdict.second_status, recorder.asked) == (RIGHT, None, [])


@needs_math_verify
def test_merged_votes_change_what_is_extracted_and_nothing_else(math: Verifier) -> None:
    texts = [
        r"\boxed{x^2-1}",
        r"\boxed{(x+1)(x-1)}",
        r"\boxed{(x-1)(x+1)}",
        r"\boxed{(x-1)(x+1)}",
        "#### 7",
        "none",
    ]
    responses = [
        (problem(gold, number), text, False) for number, gold in enumerate(["x^2-1", "3"]) for text in texts
    ]
    responses.append((problem("B", 2, ("1", "2")), "#### B", False))
    assert isinstance(math, MathVerifier)
    merging = MathVerifier(math._pool, timeout_seconds=20.0, merge_votes=True)
    plain, merged = math.grade(responses), merging.grade(responses)
    assert [one.status for one in merged] == [one.status for one in plain]
    assert [one.second_status for one in merged] == [one.second_status for one in plain]
    assert [one.extracted for one in plain[:6]] == [
        "x^2-1",
        "(x+1)(x-1)",
        "(x-1)(x+1)",
        "(x-1)(x+1)",
        "7",
        None,
    ]
    # the answer with most votes stands for the others, whether it is right (the first problem) or wrong (the second)
    assert [one.extracted for one in merged] == [*["(x-1)(x+1)"] * 4, "7", None] * 2 + ["B"]
    assert merging.version != math.version


def grade_alone(verifier: Verifier, count: int, seed: int) -> tuple[list[Verdict], list[float]]:
    """Hostile responses one at a time, and the seconds each took: its deadline, and what replacing a dead worker makes it wait."""
    verdicts: list[Verdict] = []
    seconds: list[float] = []
    for one, text in hostile_responses(count, seed):
        start = time.perf_counter()
        verdicts += verifier.grade([(one, text, False)])
        seconds.append(time.perf_counter() - start)
    return verdicts, seconds


def check_hostile(verifier: Verifier, count: int, seed: int, max_seconds: float) -> None:
    assert isinstance(verifier, MathVerifier)
    assert verifier.grade([(problem("8"), "#### 5+3", False)])[0].status is RIGHT
    num_workers = len(verifier._pool.process_ids)
    verdicts, seconds = grade_alone(verifier, count, seed)
    assert len(verdicts) == count
    assert all(isinstance(verdict.status, Status) for verdict in verdicts)
    assert Status.TIMED_OUT in {verdict.status for verdict in verdicts}, "nothing hostile was tried"
    assert max(seconds) < max_seconds
    assert len(verifier._pool.process_ids) == num_workers
    again = verifier.grade([(problem("8", n), f"#### {n}+{8 - n}", False) for n in range(9)])
    assert [verdict.status for verdict in again] == [RIGHT] * 9


@needs_math_verify
def test_some_hostile_responses() -> None:
    with open_verifier(TaskConfig(verifier="math", verifier_timeout_seconds=0.8), None) as verifier:
        # no limit on the seconds where other tests share the processor: the slow test has it
        check_hostile(verifier, 2 * len(FAMILIES), seed=2, max_seconds=60.0)


@needs_math_verify
@pytest.mark.slow
def test_a_thousand_hostile_responses_cost_under_two_seconds_each() -> None:
    # spare workers, so that none is waited for where a new one takes seconds to start
    with open_verifier(TaskConfig(verifier="math", verifier_workers=4), None) as verifier:
        check_hostile(verifier, 1000, seed=0, max_seconds=2.0)


def test_the_rules_alone_are_fast_on_anything_hostile() -> None:
    for one, text in hostile_responses(40 * len(FAMILIES), seed=1):
        start = time.perf_counter()
        verify(one, text)
        # a few milliseconds at most; a regular expression that backtracks takes seconds
        assert time.perf_counter() - start < 0.5, ascii(text[:100])


def test_rules_need_no_process() -> None:
    with open_verifier(TaskConfig(), None) as verifier:
        assert verifier is RULES
        responses = [(problem("5"), "#### 5", False), (problem("5"), "#### ", True)]
        assert verifier.grade(responses) == [Verdict(RIGHT, "5"), Verdict(Status.TRUNCATED, None)]
        assert verifier.version.startswith("rules-")


def test_without_math_verify_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with (
        pytest.raises(UsageError, match=r"install it with: pip install 'rlprior\[math\]'"),
        open_verifier(TaskConfig(verifier="math"), None),
    ):
        pass


REWARDS = """
import os, sys, time
import numpy as np

def score(prompt, response, answer):
    return len(response) - len(answer) + prompt.count("Q") / 4

def numpy_score(prompt, response, answer):
    return np.float32(0.5)

def behave(prompt, response, answer):
    if response == "hang":
        while True: pass
    if response == "sleep":
        time.sleep(100)
    if response == "fill":
        return len(bytearray(1 << 40))
    if response == "die":
        os._exit(7)
    if response == "child":
        os.system("sleep 100")
    return 1

def careless(prompt, response, answer):
    ok = 1
    return {"raise": lambda: ok / 0, "nan": lambda: float("nan"), "none": lambda: None, "text": lambda: "1",
            "exit": lambda: sys.exit(3), "lines": lambda: int("1\\n2")}[response]()

def two_arguments(prompt, response):
    return 0

LIMIT = 3
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def reward_config(function: str, timeout_seconds: float = 20.0, file: str = "rewards.py") -> TaskConfig:
    return TaskConfig(verifier=f"{file}:{function}", verifier_timeout_seconds=timeout_seconds)


def test_a_reward_function_pays_what_it_says(rewards: Path) -> None:
    texts = ["", "x", "xxxx", "xxxx"]
    with open_verifier(reward_config("score"), rewards) as verifier:
        responses = [(problem("12"), text, n == 3) for n, text in enumerate(texts)]
        verdicts = verifier.grade(responses)
        assert [verdict.reward for verdict in verdicts] == [-1.75, -0.75, 2.25, 2.25]
        assert [verdict.status for verdict in verdicts] == [WRONG, WRONG, RIGHT, RIGHT]
        assert verifier.grade([(problem("12"), "", True)])[0].status is Status.TRUNCATED
        assert {verdict.extracted for verdict in verdicts} == {None}
        assert Group([1], [], verdicts).rewards == [-1.75, -0.75, 2.25, 2.25]
    with open_verifier(reward_config("numpy_score"), rewards) as verifier:
        assert verifier.grade([(problem("12"), "", False)])[0].reward == 0.5


def test_a_reward_function_that_hangs_or_dies_costs_that_response(rewards: Path) -> None:
    texts = ["fine", "hang", "sleep", "fill", "fine", "die", "child", "fine"]
    with open_verifier(reward_config("behave", timeout_seconds=1.0), rewards) as verifier:
        verdicts = verifier.grade([(problem("1", n), text, False) for n, text in enumerate(texts)])
    late, lost = Status.TIMED_OUT, Status.FAILED
    statuses = [RIGHT, late, late, lost, RIGHT, lost, late, RIGHT]
    assert [verdict.status for verdict in verdicts] == statuses
    assert [verdict.reward for verdict in verdicts] == [float(status is RIGHT) for status in statuses]


@pytest.mark.parametrize(
    ("function", "response", "message"),
    [
        (
            "careless",
            "raise",
            r"rewards\.py:\d+: ZeroDivisionError: division by zero; called as .* problem 0$",
        ),
        ("careless", "nan", r"rewards\.py:24: careless returned nan; it must return a finite number"),
        ("careless", "none", r"rewards\.py:24: careless returned None; it must"),
        ("careless", "text", r"rewards\.py:24: careless returned '1'; it must"),
        ("careless", "exit", r"rewards\.py:\d+: SystemExit: 3; called"),
        ("careless", "lines", r"rewards\.py:\d+: ValueError: invalid literal"),
        (
            "two_arguments",
            "",
            r"rewards\.py: TypeError: two_arguments\(\) takes 2 positional arguments but 3",
        ),
        ("LIMIT", "", r"rewards\.py: LIMIT is not a function"),
    ],
)
def test_a_careless_reward_function_is_reported_in_one_line(
    rewards: Path, function: str, response: str, message: str
) -> None:
    with (
        open_verifier(reward_config(function), rewards) as verifier,
        pytest.raises(RunError, match=message) as raised,
    ):
        verifier.grade([(problem("1"), response, False)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "import os\nfrom not_a_module_at_all import f\n",
            r"broken\.py:2: ModuleNotFoundError: No module named",
        ),
        ("f = exit(2)\n", r"broken\.py:1: SystemExit: 2"),
        (
            "import os\nf = os._exit(3)\n",
            r"3 grading processes in a row ended before they were ready \(the last with code 3\)",
        ),
    ],
)
def test_a_reward_file_that_does_not_run_is_reported_in_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text(content)
    with open_verifier(reward_config("f", file="broken.py"), tmp_path) as verifier:
        for _ in range(2):
            with pytest.raises(RunError, match=message):
                verifier.grade([(problem("1"), "", False)])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("absent.py:f", r"absent\.py: no such file; give the path of a Python file"),
        ("rewards.py:absent", r"rewards\.py: defines no function 'absent'"),
        ("broken.py:f", r"broken\.py:2: invalid syntax"),
        ("binary.py:f", r"binary\.py: not Python source: "),
        ("null.py:f", r"null\.py: not Python source: |null\.py:None: source code .* null bytes"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_before_anything_runs(
    rewards: Path, file: str, message: str
) -> None:
    (rewards / "broken.py").write_text("import os\ndef f(:\n")
    (rewards / "binary.py").write_bytes(b"f = 1 # \xff")
    (rewards / "null.py").write_bytes(b"f = 1\0")
    config = TaskConfig(verifier=file)
    with pytest.raises(UsageError, match=message), open_verifier(config, rewards):
        pass
    with pytest.raises(UsageError, match=message):
        task_inputs(str(rewards), {"rl": config})


def test_the_version_of_a_reward_changes_with_its_file(rewards: Path) -> None:
    def version() -> str:
        with open_verifier(reward_config("score"), rewards) as verifier:
            assert isinstance(verifier, RewardVerifier)
            return verifier.version

    before = version()
    assert version() == before
    (rewards / "rewards.py").write_text(REWARDS + "\n")
    assert version() != before


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"verifier": "maths"},
            "task: verifier = 'maths' is unknown; write 'rules', 'math' or 'path.py:function'",
        ),
        ({"verifier": "reward.py"}, "verifier = 'reward.py' is unknown"),
        ({"verifier": "reward.py:f()"}, "is unknown"),
        ({"verifier_timeout_seconds": 0.0}, "verifier_timeout_seconds = 0.0 must be a time above 0"),
        ({"verifier_timeout_seconds": float("inf")}, "must be a time above 0"),
        ({"verifier_workers": 0}, "verifier_workers must be at least 1"),
    ],
)
def test_bad_settings(table: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        decode(TaskConfig, table, source="rl.toml", where="task")
    assert message in str(raised.value)
