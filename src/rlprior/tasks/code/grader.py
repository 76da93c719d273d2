"""Grades programs by running them: what they return is compared where they cannot reach."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlprior.config import RunError
from rlprior.runs.identity import code_fingerprint
from rlprior.tasks.code.comparison import is_expected
from rlprior.tasks.code.sandbox import Outcome, Request, Sandbox
from rlprior.tasks.code.values import canonical_text
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.tasks.verifier import Response

MIN_CPU_SECONDS = 5
"""Processor time of a program that may take any, its start included."""
CPU_FACTOR = 4
"""What a program may take, in units of what the reference solution takes.

Source: evalplus, evalplus/config.py (`DEFAULT_GT_TIME_LIMIT_FACTOR`). Differs: of all calls together, and of processor time.
"""
REFERENCE_CPU_SECONDS = 240

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
Sources = tuple[tuple[str, str], ...]
_CALL_OF_TEST = "_passed_its_test"


def program_sources(text: str, prompt: str) -> Sources:
    r"""Where a program may be in a response, the likeliest first: its fenced blocks from the last on, then the response itself.

    Args:
        text: the response.
        prompt: code that the response continues; a block may redefine what it defines.

    Returns:
        (head, body) pairs for `Request.sources`.

    >>> program_sources("Sure:\n```python\ndef f(): pass\n```\n", "import math\n")[0]
    ('import math\n', 'def f(): pass\n')
    """
    line_end = "" if prompt.endswith("\n") or not prompt else "\n"
    blocks = [(prompt + line_end, block) for block in reversed(_FENCE.findall(text))]
    return (*blocks, (prompt, text))


class CodeVerifier:
    """Runs each program in the sandbox and compares what it returns with what the reference solution returns.

    CORRECT if every call returned what is expected, UNPARSABLE if the response holds no Python that defines the function, TIMED_OUT
    and FAILED (out of memory, or killed) if the calls did not end, WRONG otherwise; anything but CORRECT is TRUNCATED where the
    response was cut. The extracted answer is a hash of the outputs: programs that behave alike vote alike.

    Args:
        sandbox: open.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._references: dict[str, Outcome] = {}

    @property
    def version(self) -> str:
        return f"code-python{platform.python_version()}-{code_fingerprint(['rlprior.tasks.code'])}"

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order; of responses with one program it runs once.

        Args:
            responses: `problem.reference` is what `rlprior.tasks.code.problems` describes.

        Raises:
            RunError: programs cannot be isolated here, or a reference solution does not run.
        """
        problems = {problem.id: problem for problem, _, _ in responses}
        # an id names a problem within a batch; a reference is what two batches can share
        keys = {problem_id: _key(problem.reference) for problem_id, problem in problems.items()}
        self._run_references({keys[problem_id]: problem for problem_id, problem in problems.items()})
        programs = [
            (problem.id, program_sources(text, problem.reference["prompt"])) for problem, text, _ in responses
        ]

        def judge(program: tuple[str, Sources]) -> Verdict:
            problem_id, sources = program
            return self._judge(problems[problem_id].reference, keys[problem_id], sources)

        distinct = list(dict.fromkeys(programs))
        verdicts = dict(zip(distinct, self._sandbox.map(judge, distinct), strict=True))
        return [
            Verdict(Status.TRUNCATED, verdicts[program].extracted)
            if truncated and verdicts[program].status is not Status.CORRECT
            else verdicts[program]
            for program, (_, _, truncated) in zip(programs, responses, strict=True)
        ]

    def _run_references(self, problems: Mapping[str, Problem]) -> None:
        """Of problems whose expected values are the outputs of a solution, those that have not run yet."""
        solved = [
            (key, problem)
            for key, problem in problems.items()
            if "solution" in problem.reference and key not in self._references
        ]
        outcomes = self._sandbox.map(self._run_solution, [problem for _, problem in solved])
        for (key, problem), outcome in zip(solved, outcomes, strict=True):
            if outcome.outputs is None:
                raise RunError(f"the reference solution of {problem.id} does not run: {outcome.detail}")
            self._references[key] = outcome

    def _run_solution(self, problem: Problem) -> Outcome:
        reference = problem.reference
        return self._sandbox.run(
            Request(
                sources=(("", reference["solution"]),),
                entry_point=reference["entry_point"],
                inputs=reference["inputs"],
                max_cpu_seconds=REFERENCE_CPU_SECONDS,
            )
        )

    def _judge(self, reference: Mapping[str, Any], key: str, sources: Sources) -> Verdict:
        if "test" in reference:
            return self._judge_by_test(reference, sources)
        solved = self._references.get(key, Outcome(reference.get("expected")))
        request = Request(
            sources=sources,
            entry_point=reference["entry_point"],
            inputs=reference["inputs"],
            max_cpu_seconds=max(MIN_CPU_SECONDS, math.ceil(CPU_FACTOR * solved.cpu_seconds)),
        )
        outcome = self._sandbox.run(request)
        if outcome.outputs is None:
            return Verdict(outcome.status or Status.FAILED, None)
        rows = zip(outcome.outputs, solved.outputs or [], reference["inputs"], strict=True)
        is_correct = all(
            is_expected(reference["comparison"], output, expected, arguments, reference["tolerance"])
            for output, expected, arguments in rows
        )
        status = Status.CORRECT if is_correct else Status.WRONG
        return Verdict(status, _behaviour(outcome.outputs, status))

    def _judge_by_test(self, reference: Mapping[str, Any], sources: Sources) -> Verdict:
        """The test runs beside the program, which could look at it; that it passed is told by a word drawn for this run."""
        word = secrets.token_hex(16)
        request = Request(
            sources=sources,
            entry_point=reference["entry_point"],
            inputs=[[]],
            epilogue=f"{reference['test']}\ndef {_CALL_OF_TEST}():\n    return {word!r}\n",
            call=_CALL_OF_TEST,
            max_cpu_seconds=MIN_CPU_SECONDS,
        )
        outcome = self._sandbox.run(request)
        if outcome.outputs is None:
            return Verdict(outcome.status or Status.FAILED, None)
        return Verdict(Status.CORRECT if outcome.outputs == [word] else Status.WRONG, None)


@contextlib.contextmanager
def open_code_verifier(*, num_workers: int, unsafe_exec: bool = False) -> Iterator[CodeVerifier]:
    """A verifier of programs; open it once and give it whole batches.

    Args:
        num_workers: how many programs run at once.
        unsafe_exec: run them where the system cannot isolate them, too.
    """
    with Sandbox(num_workers=num_workers, unsafe_exec=unsafe_exec) as sandbox:
        yield CodeVerifier(sandbox)


def _key(reference: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(reference, sort_keys=True).encode()).hexdigest()


def _behaviour(outputs: Sequence[Any], status: Status) -> str | None:
    """A hash of what a program returned, None where it returned what is no value.

    Of equal outputs one may count as correct and the other not (3.0 within the tolerance of a float, 3 not): they are two votes.
    """
    try:
        text = canonical_text(list(outputs))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    digest = hashlib.sha256(f"{status} {text}".encode(errors="surrogatepass"))
    return f"outputs {digest.hexdigest()[:16]}"
