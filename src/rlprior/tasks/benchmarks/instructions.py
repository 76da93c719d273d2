"""IFEval: instructions whose following a program can check, with lm-evaluation-harness's checkers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.tasks.benchmarks.benchmark import Benchmark
from rlprior.tasks.benchmarks.sources import Record, Source
from rlprior.tasks.problem import Problem, Status, Verdict
from rlprior.tasks.verifier import Response


def read_ifeval(record: Record) -> Problem:
    """`key`, `prompt`, `instruction_id_list` and `kwargs`, an object of arguments an instruction."""
    names, arguments = record.texts("instruction_id_list"), record["kwargs"]
    if not names or not isinstance(arguments, list) or len(arguments) != len(names):
        raise record.wrong("kwargs", "a list of as many objects as there are instructions")
    prompt = record.text("prompt")
    reference = {
        "prompt": prompt,
        "instructions": [
            {"id": name, "arguments": {key: value for key, value in (given or {}).items() if value}}
            for name, given in zip(names, arguments, strict=True)
        ],
    }
    answer = ", ".join(names)
    return Problem(
        id="", task="", difficulty=0, prompt=f"{prompt}\n\n", solution="", answer=answer, reference=reference
    )


class InstructionVerifier:
    """A response is correct where it follows every instruction of its prompt (prompt-level accuracy, strict).

    The second status is the loose one: the response follows each instruction as it is, or without its first or its last line or its
    asterisks. No answer is extracted, so nothing votes. A response that was cut and does not follow all is `TRUNCATED`.

    Source: the checkers of lm-evaluation-harness's `ifeval`, which are those of arXiv:2311.07911.
    Differs: what the checkers leave to chance (the language of a short text) has a fixed seed.
    """

    def __init__(self) -> None:
        self._checkers = _import_checkers()

    @property
    def version(self) -> str:
        return f"ifeval-{importlib.metadata.version('lm_eval')}"

    def grade(self, responses: Sequence[Response]) -> list[Verdict]:
        """A verdict for each response, in order.

        Raises:
            RunError: an instruction that the checkers do not know, or one that needs data of NLTK that is not there.
        """
        return [self._grade(*response) for response in responses]

    def _grade(self, problem: Problem, response: str, truncated: bool) -> Verdict:
        missed = Status.TRUNCATED if truncated else Status.WRONG
        strict, loose = (
            Status.CORRECT if self._follows(problem, response, check) else missed
            for check in (
                self._checkers.test_instruction_following_strict,
                self._checkers.test_instruction_following_loose,
            )
        )
        return Verdict(strict, None, second_status=loose)

    def _follows(self, problem: Problem, response: str, check: Any) -> bool:
        reference: Mapping[str, Any] = problem.reference
        instructions = reference["instructions"]
        example = self._checkers.InputExample(
            key=0,
            instruction_id_list=[one["id"] for one in instructions],
            prompt=reference["prompt"],
            kwargs=[one["arguments"] for one in instructions],
        )
        try:
            with _fixed_chance():
                return check(example, response).follow_all_instructions
        except LookupError as error:  # NLTK's, of data that is not installed, and the registry's KeyError
            if isinstance(error, KeyError):
                raise RunError(f"problem {problem.id}: unknown instruction {error}") from None
            raise RunError(
                "IFEval needs NLTK's punkt_tab; run: python -m nltk.downloader punkt_tab"
            ) from None


@contextlib.contextmanager
def _fixed_chance() -> Iterator[None]:
    """The checkers draw from Python's own generator: it is seeded for them, and left as it was."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _import_checkers() -> ModuleType:
    try:
        import langdetect

        # tries to download a tokenizer, and says that it has whether or not it could
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise UsageError(
            f"IFEval's checkers are lm-evaluation-harness's ({error}); install them with: pip install 'rlprior[harness]'"
        ) from None
    langdetect.DetectorFactory.seed = 0
    return utils


IFEVAL = Benchmark(
    name="ifeval",
    title="IFEval",
    category="Instructions",
    questions=(
        Source(repo="google/IFEval", split="train", folder="ifeval", files=("ifeval/ifeval_input_data",)),
    ),
    read=read_ifeval,
    shots=(),
    grading="instructions",
    max_new_tokens=1280,
)
