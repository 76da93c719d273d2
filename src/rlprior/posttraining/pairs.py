"""Preference pairs from graded samples: correct against wrong answers of one prompt."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlprior.config import RunError, UsageError
from rlprior.runs.files import read_jsonl, write_atomically
from rlprior.sampling.grades import Grade, grades_of, read_grades
from rlprior.sampling.store import Sample, read_samples
from rlprior.seeding import numpy_generator

CORRECT = "correct"


@dataclass(frozen=True)
class Pair:
    """Two answers of one problem, the correct one and the other."""

    problem_id: str
    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """What became of the prompts of a store.

    Attributes:
        num_prompts: prompts that were sampled.
        num_prompts_paired: those with a correct answer and one to reject; each has at least one pair.
        num_prompts_without_rejected, num_prompts_without_correct: the others; a prompt with neither counts as the latter.
        num_duplicates: answers left out because an earlier one of the prompt has the same text.
        num_pairs: pairs made.
    """

    num_prompts: int
    num_prompts_paired: int
    num_prompts_without_rejected: int
    num_prompts_without_correct: int
    num_duplicates: int
    num_pairs: int

    def __str__(self) -> str:
        return (
            f"{self.num_pairs} pairs from {self.num_prompts_paired} of {self.num_prompts} prompts "
            f"({self.num_prompts_without_correct} without a correct answer, {self.num_prompts_without_rejected} without one to reject)"
        )


def read_graded(samples_path: Path) -> tuple[list[Sample], list[Grade]]:
    """A store's graded samples, and the grade of each.

    Raises:
        UsageError: no store or no grades there.
        RunError: files that are damaged, or grades of other samples.
    """
    grades_path = grades_of(samples_path)
    for path in (samples_path, grades_path):
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file; give the store of samples (samples/*.jsonl) of a finished evaluation"
            )
    samples = {(one.problem_id, one.sample_index): one for one in read_samples(samples_path)}
    try:
        header = read_jsonl(grades_path)[0]
        grades = read_grades(grades_path, grader=header["grader"])
    except (ValueError, KeyError, TypeError, IndexError):
        grades = None
    if grades is None:
        raise RunError(f"{grades_path}: not a whole file of grades; evaluate again to have it written")
    try:
        return [samples[grade.problem_id, grade.sample_index] for grade in grades], grades
    except KeyError:
        raise RunError(
            f"{grades_path}: grades samples that {samples_path.name} does not hold; evaluate again"
        ) from None


def make_pairs(
    samples: Sequence[Sample],
    grades: Sequence[Grade],
    *,
    rejected: Collection[str] = ("wrong",),
    max_pairs_per_prompt: int,
    seed: int,
) -> tuple[list[Pair], PairCounts]:
    """Pairs of a correct answer with one to reject, prompt by prompt in the order of the samples.

    Of answers with one text the first alone counts. Of a prompt's a x b pairs all are taken, or `max_pairs_per_prompt` of them
    drawn without replacement, each as likely as any other; the draw depends on the seed and the problem alone.

    Args:
        samples: answers, several a problem.
        grades: of the samples, in their order.
        rejected: statuses of answers to reject.
        max_pairs_per_prompt: at least 1.
        seed: of the draws.
    """
    by_prompt: dict[str, tuple[list[Sample], list[Sample]]] = {}
    seen: set[tuple[str, str]] = set()
    for sample, grade in zip(samples, grades, strict=True):
        correct, wrong = by_prompt.setdefault(sample.problem_id, ([], []))
        if (sample.problem_id, sample.text) in seen:
            continue
        seen.add((sample.problem_id, sample.text))
        if grade.status == CORRECT:
            correct.append(sample)
        elif grade.status in rejected:
            wrong.append(sample)
    pairs: list[Pair] = []
    for problem_id, (correct, wrong) in by_prompt.items():
        order = numpy_generator(seed, "pairs", problem_id).permutation(len(correct) * len(wrong))
        pairs += [
            Pair(problem_id, correct[place // len(wrong)], wrong[place % len(wrong)])
            for place in sorted(order[:max_pairs_per_prompt].tolist())
        ]
    counts = PairCounts(
        num_prompts=len(by_prompt),
        num_prompts_paired=sum(bool(correct and wrong) for correct, wrong in by_prompt.values()),
        num_prompts_without_rejected=sum(
            bool(correct and not wrong) for correct, wrong in by_prompt.values()
        ),
        num_prompts_without_correct=sum(not correct for correct, _ in by_prompt.values()),
        num_duplicates=len(samples) - len(seen),
        num_pairs=len(pairs),
    )
    return pairs, counts


def encode_pairs(
    pairs: Sequence[Pair], prompt_ids: Mapping[str, Sequence[int]], *, where: str
) -> list[dict[str, list[int]]]:
    """Each pair as token ids: the prompt's, and those that the sampler drew.

    Args:
        pairs: the pairs.
        prompt_ids: of each problem, by its id.
        where: the store, for the error.

    Returns:
        prompt_ids, chosen_ids and rejected_ids of each pair.

    Raises:
        UsageError: a pair of a problem that is not among `prompt_ids`.
    """
    unknown = next((pair.problem_id for pair in pairs if pair.problem_id not in prompt_ids), None)
    if unknown is not None:
        raise UsageError(
            f"{where}: answers problem {unknown}, which dpo.task does not have; give the task, num_problems, split and task_seed that were sampled"
        )
    return [
        {
            "prompt_ids": list(prompt_ids[pair.problem_id]),
            "chosen_ids": list(pair.chosen.token_ids),
            "rejected_ids": list(pair.rejected.token_ids),
        }
        for pair in pairs
    ]


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One line a pair: its problem, and which samples of the store were taken."""
    lines = [
        json.dumps(
            {
                "problem_id": pair.problem_id,
                "chosen": pair.chosen.sample_index,
                "rejected": pair.rejected.sample_index,
            }
        )
        for pair in pairs
    ]
    write_atomically(path, "".join(line + "\n" for line in lines))
