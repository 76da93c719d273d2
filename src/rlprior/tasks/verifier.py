"""Verifiers of whole batches: by rules alone, by rules and then math-verify, by exact text, or by a user's reward function."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from rlprior.config import RunError
from rlprior.runs.identity import code_fingerprint, input_identity
from rlprior.tasks.canonical import canonical_answer, is_number
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.equivalence import comparison_pair
from rlprior.tasks.problem import UNGRADED, Problem, Status, Verdict
from rlprior.tasks.verify import MAX_READ_CHARACTERS, find_answer, stated_answer, verify
from rlprior.tasks.votes import Candidate, merge_answers
from rlprior.tasks.workers import WorkerPool

Response = tuple[Problem, str, bool]
"""Problem, text that follows its prompt, and whether the length limit cut it."""

_Answered = tuple[str, str | None]
"""Problem and canonical form of an answer to it."""

_RULES = ("rlprior.tasks.canonical", "rlprior.tasks.verify")
"""Modules that verdicts without an engine depend on."""


class Verifier(Protocol):
    """Grades responses.

    Attributes:
        version: names what decides a verdict; grades of another version are not comparable.
    """

    @property
    def version(self) -> str: ...

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order."""
        ...


class RulesVerifier:
    """`verify` and nothing else: in this process, and never slow."""

    @property
    def version(self) -> str:
        return f"rules-{code_fingerprint(_RULES)}"

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order."""
        return [verify(problem, text, truncated=truncated) for problem, text, truncated in responses]


RULES = RulesVerifier()


class MathVerifier:
    """Two graders: the rules, and math-verify. What either takes is correct.

    An answer that the rules take is correct, whatever math-verify says; `second_status` says it. Any other has math-verify's verdict, with
    the rules' WRONG as `second_status`. Where math-verify has none (it came too late, cannot be asked, or has only a letter to compare)
    there is no second one. Responses to a problem whose answers have one canonical form share a verdict, that of the first of them:
    equal answers are equal votes. A verdict depends on the clock only where the deadline is near.

    Args:
        pool: of workers that compare.
        timeout_seconds: of the pool, for the version.
        merge_votes: answers of a problem that math-verify takes for each other are extracted as one of them, as `merge_answers` says.
    """

    def __init__(self, pool: WorkerPool, *, timeout_seconds: float, merge_votes: bool = False) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._merge_votes = merge_votes

    @property
    def version(self) -> str:
        code = code_fingerprint(["rlprior.tasks"])
        votes = "-votes" if self._merge_votes else ""
        return f"math-{importlib.metadata.version('math-verify')}-{self._timeout_seconds:g}s{votes}-{code}"

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order; `merge_votes` looks at all of them."""
        verdicts = RULES.grade(responses)
        texts: dict[_Answered, str] = {}
        pairs: dict[_Answered, list[str]] = {}
        for (problem, text, _), verdict in zip(responses, verdicts, strict=True):
            key = (problem.id, verdict.extracted)
            if verdict.extracted is None or problem.choices or key in texts:
                continue
            found = find_answer(text)
            texts[key] = found.text if found else ""
            if pair := comparison_pair(problem.written_answer or problem.answer, texts[key]):
                pairs[key] = pair
        results = dict(zip(pairs, self._pool.map(list(pairs.values())), strict=True))
        both = [
            _with_second(verdict, results.get((problem.id, verdict.extracted)))
            for (problem, _, _), verdict in zip(responses, verdicts, strict=True)
        ]
        return self._merge(responses, both, texts) if self._merge_votes else both

    def _merge(
        self, responses: Sequence[Response], verdicts: Sequence[Verdict], texts: dict[_Answered, str]
    ) -> list[Verdict]:
        votes: dict[str, Counter[tuple[str, Status]]] = {}
        for (problem, _, _), verdict in zip(responses, verdicts, strict=True):
            if (problem.id, verdict.extracted) in texts and verdict.status not in UNGRADED:
                votes.setdefault(problem.id, Counter())[verdict.extracted or "", verdict.status] += 1
        candidates = [
            [
                Candidate(answer, texts[problem, answer], status, count)
                for (answer, status), count in one.items()
            ]
            for problem, one in votes.items()
        ]
        counts_as = dict(zip(votes, merge_answers(candidates, self._pool.map), strict=True))
        return [
            replace(
                verdict,
                extracted=counts_as.get(problem.id, {}).get(verdict.extracted or "", verdict.extracted),
            )
            for (problem, _, _), verdict in zip(responses, verdicts, strict=True)
        ]


def _with_second(verdict: Verdict, result: bool | Status | None) -> Verdict:
    """The rules' verdict and math-verify's, which is None where it was not asked."""
    if result is None or verdict.extracted is None:
        return verdict
    if verdict.status is Status.CORRECT:
        said = None if isinstance(result, Status) else Status.CORRECT if result else Status.WRONG
        return replace(verdict, second_status=said)
    if isinstance(result, Status):
        return replace(verdict, status=result)
    return replace(verdict, status=Status.CORRECT if result else Status.WRONG, second_status=verdict.status)


class RewardVerifier:
    """A user's `function(prompt, response, answer) -> float`, in worker processes.

    A reward of 1 or more counts as correct, anything less as wrong, or as truncated where the response was cut; no answer is
    extracted. Without a reward in time (`TIMED_OUT`, `FAILED`) it is 0.
    """

    def __init__(self, pool: WorkerPool, *, version: str) -> None:
        self._pool = pool
        self.version = version

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order.

        Raises:
            RunError: the function raised, or returned no finite number; with its file and line.
        """
        items = [
            [problem.prompt, text, problem.written_answer or problem.answer] for problem, text, _ in responses
        ]
        verdicts: list[Verdict] = []
        for (problem, _, truncated), result in zip(responses, self._pool.map(items), strict=True):
            if isinstance(result, Status):
                verdicts.append(Verdict(result, None, 0.0))
                continue
            if "error" in result:
                raise RunError(f"{result['error']} for problem {problem.id}")
            missed = Status.TRUNCATED if truncated else Status.WRONG
            status = Status.CORRECT if result["reward"] >= 1 else missed
            verdicts.append(Verdict(status, None, result["reward"]))
        return verdicts


_PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u00b4"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LETTER = re.compile(r"\(?([a-z])\)?")


class AliasVerifier:
    """Short free text (TriviaQA, NQ-open): the first line of the response, normalised, is one of the accepted answers.

    Accepted are `problem.answer` and the texts of `problem.reference["aliases"]`. Case, articles, punctuation and spacing do not count.

    Args:
        punctuation_becomes: what a punctuation mark is read as: nothing (SQuAD, NQ-open) or a space (TriviaQA).

    Source: `normalize_answer` and exact match of SQuAD's and TriviaQA's own evaluation scripts (arXiv:1606.05250, arXiv:1705.03551).
    Differs: typographic quotes are punctuation in both; what normalisation leaves nothing of ("The The") is compared without it.
    """

    def __init__(self, *, punctuation_becomes: Literal["", " "] = "") -> None:
        self._punctuation = str.maketrans(dict.fromkeys(_PUNCTUATION, punctuation_becomes))

    @property
    def version(self) -> str:
        kind = "spaced-" if " " in self._punctuation.values() else ""
        return f"alias-{kind}{code_fingerprint([*_RULES, __name__])}"

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order."""
        return [self._grade(*response) for response in responses]

    def _grade(self, problem: Problem, response: str, truncated: bool) -> Verdict:
        line, line_end, _ = response[:MAX_READ_CHARACTERS].lstrip().partition("\n")
        answer = self._normalise(line)
        if not answer or (truncated and not line_end):
            return Verdict(Status.TRUNCATED if truncated else Status.UNPARSABLE, None)
        accepted = [problem.answer, *(problem.reference or {}).get("aliases", ())]
        correct = answer in {self._normalise(alias) for alias in accepted}
        return Verdict(Status.CORRECT if correct else Status.WRONG, answer)

    def _normalise(self, text: str) -> str:
        lowered = unicodedata.normalize("NFC", text).lower()
        bare = _ARTICLES.sub(" ", lowered.translate(self._punctuation)).split()
        return " ".join(bare or lowered.split())


class ExactVerifier:
    """Exact text after "the answer is" (BIG-Bench Hard): what its last occurrence states is the gold answer, but for case and spacing.

    Equal numbers are equal, `(B)` is `B`, and a final full stop does not count. A problem with `choices` (MMLU with worked answers: "The
    answer is (C).") is graded by its letter, as `verify` does.

    Source: prompts and evaluation of BIG-Bench Hard (arXiv:2210.09261), "So the answer is X."; of MMLU with chain of thought (arXiv:2210.11416).
    Differs: of several occurrences the last one counts; stop strings decide what of a response is read at all.
    """

    @property
    def version(self) -> str:
        return f"exact-{code_fingerprint([*_RULES, __name__])}"

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order."""
        return [self._grade(*response) for response in responses]

    def _grade(self, problem: Problem, response: str, truncated: bool) -> Verdict:
        if problem.choices:
            return verify(problem, response, truncated=truncated)
        answer = _exact_text(response)
        # of a response that was cut, an answer that one more digit would change was not finished
        if not answer or (truncated and _exact_text(response + "0") != answer):
            return Verdict(Status.TRUNCATED if truncated else Status.UNPARSABLE, None)
        correct = answer == _normalise_exactly(problem.answer)
        return Verdict(Status.CORRECT if correct else Status.WRONG, answer)


def _exact_text(response: str) -> str:
    return _normalise_exactly(stated_answer(response[-MAX_READ_CHARACTERS:]) or "")


def _normalise_exactly(text: str) -> str:
    bare = " ".join(text.replace("**", "").split()).strip("\"'").removesuffix(".").casefold().strip()
    if is_number(bare):
        return canonical_answer(bare)
    letter = _LETTER.fullmatch(bare)
    return letter[1] if letter else bare


@contextlib.contextmanager
def open_verifier(
    config: TaskConfig, data_dir: Path | None, *, merge_votes: bool = False
) -> Iterator[Verifier]:
    """The verifier of a task; open it once and give it whole batches. Its processes start with the first that needs them.

    Args:
        config: of the task.
        data_dir: what the relative path of a reward function is relative to; None for the working directory.
        merge_votes: answers that math-verify takes for each other count as one; of verifier 'math' alone.

    Raises:
        UsageError: math-verify is not installed, or there is no such reward function.
    """
    limits = {"num_workers": config.verifier_workers, "timeout_seconds": config.verifier_timeout_seconds}
    config.check_verifier(data_dir)
    if reward := config.reward_function(data_dir):
        path, function = reward
        version = f"{input_identity(path)}:{function}-{config.verifier_timeout_seconds:g}s"
        arguments = {"path": str(path.resolve()), "function": function}
        with WorkerPool("rlprior.tasks.reward:load_reward", arguments, **limits) as pool:
            yield RewardVerifier(pool, version=f"reward-{version}")
    elif config.verifier == "math":
        with WorkerPool("rlprior.tasks.equivalence:load_comparison", {}, **limits) as pool:
            yield MathVerifier(pool, timeout_seconds=config.verifier_timeout_seconds, merge_votes=merge_votes)
    else:
        yield RULES
