"""Who grades the sampled answers of a benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rlprior.config import UsageError
from rlprior.tasks.benchmarks.benchmark import Benchmark
from rlprior.tasks.benchmarks.instructions import InstructionVerifier
from rlprior.tasks.code.grader import open_code_verifier
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.verifier import AliasVerifier, ExactVerifier, Verifier, open_verifier

TIMEOUT_SECONDS = 5.0
"""For one comparison by math-verify. It takes up to 0.2 seconds on an idle machine; a busy one must not change a score."""


@contextlib.contextmanager
def open_grader(
    benchmark: Benchmark, *, num_workers: int = 2, unsafe_exec: bool = False
) -> Iterator[Verifier]:
    """The grader of a benchmark's sampled answers; open it once and give it whole batches.

    Args:
        benchmark: whose answers.
        num_workers: processes that math-verify or programs run in.
        unsafe_exec: programs may run where no isolation can be had.

    Raises:
        UsageError: what grading needs is not installed, or the benchmark is scored by likelihood and has no answers to grade.
    """
    if benchmark.metric == "likelihood":
        raise UsageError(f"{benchmark.name} is scored by likelihood; it has no sampled answers to grade")
    if benchmark.grading in ("rules", "math"):
        task = TaskConfig(
            kind="file",
            path=benchmark.name,
            verifier=benchmark.grading,
            verifier_timeout_seconds=TIMEOUT_SECONDS,
            verifier_workers=num_workers,
        )
        with open_verifier(task, None, merge_votes=True) as verifier:
            yield verifier
    elif benchmark.grading == "alias":
        yield AliasVerifier(punctuation_becomes=" " if benchmark.name == "triviaqa" else "")
    elif benchmark.grading == "exact":
        yield ExactVerifier()
    elif benchmark.grading == "instructions":
        yield InstructionVerifier()
    else:
        with open_code_verifier(num_workers=num_workers, unsafe_exec=unsafe_exec) as verifier:
            yield verifier
