"""Stores of graded samples made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprior.sampling.grades import Grade, grades_of, write_grades
from rlprior.sampling.store import Sample, SampleStore, StoreKey
from rlprior.tasks.problem import Problem


def make_sample(problem_id: str, index: int, text: str, token_ids: Sequence[int] = ()) -> Sample:
    """A finished sample; without token ids, some that depend on the text."""
    ids = tuple(token_ids) or tuple(10 + ord(character) for character in text)
    return Sample(
        problem_id=problem_id,
        sample_index=index,
        token_ids=ids,
        text=text,
        finish_reason="stop",
        log_prob_nats=-1.0,
        num_tokens=len(ids),
    )


def write_store(path: Path, samples: Sequence[Sample], grades: Sequence[Grade]) -> Path:
    """A store with its grades beside it; returns `path`."""
    store = SampleStore.open(path, StoreKey(model_hash="m", task="t", decoding={}, seed=0))
    store.append(samples)
    write_grades(grades_of(path), grades, grader="by hand")
    return path


def write_answers(path: Path, problems: Sequence[Problem], tokenizer: Any) -> Path:
    """Three answers to each problem: right, right in other words, and wrong; returns the store."""
    samples: list[Sample] = []
    grades: list[Grade] = []
    for problem in problems:
        texts = [f" #### {problem.answer}", f" it is\n#### {problem.answer}", f" #### 1{problem.answer}"]
        for index, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            samples.append(make_sample(problem.id, index, text, [*ids, tokenizer.eos_token_id]))
            grades.append(Grade(problem.id, index, "correct" if index < 2 else "wrong", None))
    return write_store(path, samples, grades)
