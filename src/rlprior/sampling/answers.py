"""Answers to problems: one pool of samples a task, graded apart, summarised a problem at a time."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlprior.config import RunError, fingerprint
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import evaluation_mode
from rlprior.runs.files import file_hash, read_jsonl, write_atomically
from rlprior.sampling.grades import Grade, grade, grades_of, read_grades, write_grades
from rlprior.sampling.pools import questions_of
from rlprior.sampling.sampler import Decoding, sample
from rlprior.sampling.stopping import cut_at_stop
from rlprior.sampling.store import Sample, SampleStore, StoreKey
from rlprior.seeding import torch_generator
from rlprior.statistics.estimators import cons_at_m
from rlprior.tasks.canonical import canonical_answer
from rlprior.tasks.problem import UNGRADED, Problem, Status
from rlprior.tasks.verifier import RULES, Verifier

MAX_ROWS = 512
"""Responses sampled together: enough to fill the processor."""
MAX_CACHE_BYTES = 2**31
"""Of the keys and values of the responses sampled together, which long prompts would make larger."""


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
        name: of the task; with the problem and the sample's number it decides the random numbers, so that every model meets the same
            ones, and more samples are drawn to those there are.
        path: sample store; its grades and the questions lie beside it.
        model_identity: of the weights.
        samples_per_problem: pool size m.
        decoding: temperature, nucleus, length.
        seed: of the sampling.
        progress: called with the number of responses that were there, and that each batch adds.
        verifier: who grades.

    Returns:
        Columns with one entry a problem: problem_ids, num_correct, consensus (expected Cons@m), consensus_tied, num_truncated,
        num_unparsable, num_timed_out, num_failed (the statuses of that name), num_disputed (two graders disagree), num_tokens, num_cut
        (1 where the prompt lost its beginning).
    """
    key = StoreKey(model_hash=model_identity, task=name, decoding=dataclasses.asdict(decoding), seed=seed)
    store = SampleStore.open(path, key)
    write_questions(questions_of(path), problems)
    by_id = {problem.id: problem for problem in problems}
    room = prompt_room(model, decoding)
    encoded = {problem.id: _encode_end(tokenizer, problem, room) for problem in problems}
    prompts = {problem_id: ids for problem_id, (ids, _) in encoded.items()}
    missing = _missing_indices(store, list(by_id), samples_per_problem)
    progress(len(by_id) * samples_per_problem - sum(map(len, missing.values())))
    for batch, indices in _batches(missing, prompts, _max_batch_tokens(model), decoding.max_new_tokens):
        asked = [by_id[problem_id] for problem_id in batch]
        generators = [
            [torch_generator(seed, "answers", name, problem.id, index) for index in indices]
            for problem in asked
        ]
        ids = [prompts[problem_id] for problem_id in batch]
        store.append(_draw(model, tokenizer, asked, ids, indices, decoding, generators))
        progress(len(batch) * len(indices))
    pools = store.pool(list(by_id), samples_per_problem)
    grades_path = grades_of(path)
    # grades hold for this verifier, these samples and these gold answers
    gold = [
        [problem.id, problem.answer, problem.written_answer, problem.choices, problem.reference]
        for problem in problems
    ]
    grader = f"{verifier.version}-{fingerprint([file_hash(path), samples_per_problem, gold])}"
    grades = read_grades(grades_path, grader=grader)
    if grades is None:
        grades = grade([one for pool in pools for one in pool], by_id, verifier.grade)
        write_grades(grades_path, grades, grader=grader)
    is_cut = [int(encoded[problem_id][1]) for problem_id in by_id]
    return {**_columns(pools, grades, samples_per_problem), "num_cut": is_cut}


def prompt_room(model: Any, decoding: Decoding) -> int | None:
    """Positions of the model that a response leaves for its prompt; None where it has no last position.

    Raises:
        RunError: there are not two.
    """
    max_positions = getattr(model.config, "max_position_embeddings", None)
    if max_positions is None:
        return None
    room = max_positions - decoding.max_new_tokens
    if room < 2:
        raise RunError(
            f"max_new_tokens = {decoding.max_new_tokens} leaves no room for a prompt in the model's {max_positions} "
            "positions; write a smaller one"
        )
    return room


def _encode_end(tokenizer: Any, problem: Problem, room: int | None) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether there is no room for them all: then the first and the end."""
    ids = encode_prompt(tokenizer, problem.prompt)
    if room is None or len(ids) <= room:
        return ids, False
    return [ids[0], *ids[1 - room :]], True


def _missing_indices(store: SampleStore, problem_ids: Sequence[str], m: int) -> dict[str, tuple[int, ...]]:
    """Of each problem that lacks samples, which."""
    missing: dict[str, list[int]] = {}
    for problem_id, index in store.missing(problem_ids, m):
        missing.setdefault(problem_id, []).append(index)
    return {problem_id: tuple(indices) for problem_id, indices in missing.items()}


def _max_batch_tokens(model: Any) -> int:
    """Positions, of all rows together, whose keys and values fit into `MAX_CACHE_BYTES`."""
    config = model.config
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * num_heads * head_size * model.dtype.itemsize
    return MAX_CACHE_BYTES // bytes_per_token


def _batches(
    missing: Mapping[str, tuple[int, ...]],
    prompts: Mapping[str, Sequence[int]],
    max_batch_tokens: int,
    max_new_tokens: int,
) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Problems in order that lack the same samples, as many together as fit; where one problem's do not, some of them at a time."""
    batch: list[str] = []
    length, indices = 0, ()
    for problem_id, lacking in missing.items():
        longest = max(length, len(prompts[problem_id]) + max_new_tokens)
        max_rows = min(MAX_ROWS, max(1, max_batch_tokens // longest))
        if batch and (lacking != indices or (len(batch) + 1) * len(lacking) > max_rows):
            yield batch, indices
            batch, length = [], 0
            longest = len(prompts[problem_id]) + max_new_tokens
            max_rows = min(MAX_ROWS, max(1, max_batch_tokens // longest))
        if len(lacking) > max_rows:
            for start in range(0, len(lacking), max_rows):
                yield [problem_id], lacking[start : start + max_rows]
            continue
        batch.append(problem_id)
        length, indices = longest, lacking
    if batch:
        yield batch, indices


def _draw(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    indices: Sequence[int],
    decoding: Decoding,
    generators: Sequence[Sequence[torch.Generator]],
) -> list[Sample]:
    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    with evaluation_mode(model):
        groups = sample(
            model,
            prompts,
            decoding=decoding,
            eos_token_id=tokenizer.eos_token_id,
            generators=generators,
            decode=decode,
        )
    return [
        Sample(
            problem_id=problem.id,
            sample_index=index,
            token_ids=tuple(response.token_ids),
            text=cut_at_stop(decode(response.token_ids), decoding.stop),
            finish_reason=response.finish_reason,
            log_prob_nats=sum(response.log_probs),
            num_tokens=len(response.token_ids),
        )
        for problem, responses in zip(problems, groups, strict=True)
        for index, response in zip(indices, responses, strict=True)
    ]


def write_questions(path: Path, problems: Sequence[Problem]) -> None:
    """Add what is asked to what was, a line each, for whoever reads the samples without the task's files; a gold answer may change.

    Raises:
        RunError: a problem was asked in other words before: its samples answer another prompt.
    """
    before = {record["id"]: record for record in read_jsonl(path)}
    records = dict(before)
    for problem in problems:
        if problem.id in before and before[problem.id]["prompt"] != problem.prompt:
            raise RunError(
                f"{path}: problem {problem.id} was asked with another prompt; use another directory"
            )
        records[problem.id] = {
            "id": problem.id,
            "prompt": problem.prompt,
            "answer": problem.written_answer or problem.answer,
            "choices": list(problem.choices),
            "group": problem.group,
        }
    if records != before:
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records.values()))


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
            "num_disputed",
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
        columns["num_disputed"].append(sum(one.is_disputed for one in graded))
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
