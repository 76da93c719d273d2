"""Answers to problems: one pool of samples a task, graded apart, summarised a problem at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlprior.config import fingerprint
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import evaluation_mode
from rlprior.models.sampler import Decoding, sample
from rlprior.runs import file_hash
from rlprior.samples.estimators import cons_at_m
from rlprior.samples.grades import Grade, grade, grades_of, read_grades, write_grades
from rlprior.samples.store import Sample, SampleStore, StoreKey
from rlprior.seeding import torch_generator
from rlprior.tasks.problem import UNGRADED, Problem, Status
from rlprior.tasks.verifier import RULES, Verifier
from rlprior.tasks.verify import canonical_answer

ROWS_PER_BATCH = 512
"""Responses sampled together: enough to fill the processor, few enough for their caches to stay small."""


def answer_problems(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    name: str,
    path: Path,
    model_identity: str,
    samples_per_problem: int,
    decoding: Decoding,
    seed: int,
    progress: Callable[[int], None],
    verifier: Verifier = RULES,
) -> dict[str, list[Any]]:
    """Sample what the store at `path` lacks, grade it, and count.

    Args:
        model, tokenizer: who answers.
        problems: what is asked.
        name: of the task; with the problem it decides the random numbers, so that every model meets the same ones.
        path: sample store; its grades lie beside it.
        model_identity: of the weights.
        samples_per_problem: pool size m.
        decoding: temperature, nucleus, length.
        seed: of the sampling.
        progress: called with the number of responses each batch adds.
        verifier: who grades.

    Returns:
        Columns with one entry a problem: problem_ids, num_correct, consensus (expected Cons@m), consensus_tied, num_truncated,
        num_unparsable, num_timed_out, num_failed (the statuses of that name), num_tokens.
    """
    key = StoreKey(model_hash=model_identity, task=name, decoding=dataclasses.asdict(decoding), seed=seed)
    store = SampleStore.open(path, key)
    by_id = {problem.id: problem for problem in problems}
    problems_per_batch = max(1, ROWS_PER_BATCH // samples_per_problem)
    for start in range(0, len(problems), problems_per_batch):
        batch = problems[start : start + problems_per_batch]
        if store.missing([problem.id for problem in batch], samples_per_problem):
            generators = [torch_generator(seed, "answers", name, problem.id) for problem in batch]
            store.append(_draw(model, tokenizer, batch, samples_per_problem, decoding, generators))
        progress(len(batch) * samples_per_problem)
    pools = store.pool(list(by_id), samples_per_problem)
    grades_path = grades_of(path)
    # grades hold for this verifier, these samples and these gold answers
    gold = [[problem.id, problem.answer, problem.written_answer] for problem in problems]
    grader = f"{verifier.version}-{fingerprint([file_hash(path), gold])}"
    grades = read_grades(grades_path, grader=grader)
    if grades is None:
        grades = grade([one for pool in pools for one in pool], by_id, verifier.grade)
        write_grades(grades_path, grades, grader=grader)
    return _columns(pools, grades, samples_per_problem)


def _draw(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    m: int,
    decoding: Decoding,
    generators: Sequence[torch.Generator],
) -> list[Sample]:
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    with evaluation_mode(model):
        groups = sample(
            model,
            prompts,
            samples_per_prompt=m,
            decoding=decoding,
            eos_token_id=tokenizer.eos_token_id,
            generators=generators,
        )
    return [
        Sample(
            problem_id=problem.id,
            sample_index=index,
            token_ids=tuple(response.token_ids),
            text=tokenizer.decode(response.token_ids, skip_special_tokens=True),
            finish_reason=response.finish_reason,
            log_prob_nats=sum(response.log_probs),
            num_tokens=len(response.token_ids),
        )
        for problem, responses in zip(problems, groups, strict=True)
        for index, response in enumerate(responses)
    ]


def _columns(pools: Sequence[Sequence[Sample]], grades: Sequence[Grade], m: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "problem_ids",
            "num_correct",
            "consensus",
            "consensus_tied",
            "num_truncated",
            "num_unparsable",
            "num_timed_out",
            "num_failed",
            "num_tokens",
        )
    }
    for number, pool in enumerate(pools):
        graded = grades[number * m : (number + 1) * m]
        statuses = Counter(one.status for one in graded)
        consensus = cons_at_m(
            [one.extracted for one in graded], [one.status == Status.CORRECT for one in graded]
        )
        columns["problem_ids"].append(pool[0].problem_id)
        columns["num_correct"].append(statuses[Status.CORRECT])
        columns["consensus"].append(consensus.score)
        columns["consensus_tied"].append(consensus.tied)
        columns["num_truncated"].append(sum(one.finish_reason == "length" for one in pool))
        for status in (Status.UNPARSABLE, *UNGRADED):
            columns[f"num_{status}"].append(statuses[status])
        columns["num_tokens"].append(sum(one.num_tokens for one in pool))
    return columns


def frequent_answers_baseline(answers: Sequence[str], max_guesses: int) -> list[float]:
    """Pass@k, k = 1 to `max_guesses`, of guessing the k most frequent answers without reading the question.

    Differs: the guesses are ranked on the very problems they are scored on, which flatters the baseline: no constant guesses do better.

    >>> frequent_answers_baseline(["1", "2", "2.0", "3"], 2)
    [0.5, 0.75]
    """
    counts = [count for _, count in Counter(map(canonical_answer, answers)).most_common()]
    return [sum(counts[:k]) / len(answers) for k in range(1, max_guesses + 1)]
