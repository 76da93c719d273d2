"""Benchmarks as data: where questions come from, how they are put, and how an answer is scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlprior.config import UsageError
from rlprior.seeding import shuffled_places
from rlprior.tasks.benchmarks.sources import Record, Source, read_source
from rlprior.tasks.problem import Problem, question_id

Category = Literal[
    "General Knowledge", "Commonsense Reasoning", "Logic Reasoning", "Mathematics", "Coding", "Instructions"
]
Metric = Literal["sampled", "likelihood"]
Grading = Literal["rules", "math", "alias", "exact", "code", "instructions"]


@dataclass(frozen=True)
class Examples:
    """Worked examples of one group of questions.

    Attributes:
        preamble: what stands before the first, with its separator; may be empty.
        texts: each a question with its answer.
    """

    preamble: str
    texts: tuple[str, ...]


ExampleFile = Callable[[str, Path | None], Examples]
"""Of a group and the data directory, the group's examples from the benchmark's own file of them."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    r"""A benchmark.

    A `sampled` problem's `prompt` is continued and the text graded; of a multiple-choice one `choices` are the offered texts and
    `answer` a letter. A `likelihood` problem's `choices` are the continuations of `prompt` as they are scored, with their leading
    space, and `answer` the letter of the right one; length normalisation divides by a choice's characters without that space. Where
    the contexts differ and the continuation is one (WinoGrande), `reference` is {"contexts": [a text a choice], "continuation": text}
    and `prompt` is empty: choice i is scored by log p(continuation | contexts[i]).

    Attributes:
        name: in suites, files and folders.
        title: in tables.
        category: of the averages.
        version: of its prompts and questions; scores of two versions are not comparable.
        questions: where they come from, one source after another.
        read: a record as a problem: `prompt` ends where the answer begins, `solution` is the text that follows it in a worked example.
        shots: sources of worked examples, the first of each in turn; or the benchmark's own file of them; or None, and the first
            questions are the examples of all others and no longer asked.
        shots_by_group: a question's examples are of its own group.
        instruction: opens a prompt without examples, which alone show the form of an answer. `{group}` is filled in.
        metric: `sampled` answers, or the `likelihood` of the choices.
        length_normalised: of a likelihood metric, that the headline divides by the length of a choice.
        grading: who grades sampled answers.
        stop: a sampled answer ends before the first of these.
        max_new_tokens: default limit of a sampled answer.
    """

    name: str
    title: str
    category: Category
    version: str = "1"
    questions: tuple[Source, ...]
    read: Callable[[Record], Problem]
    shots: tuple[Source, ...] | ExampleFile | None = None
    shots_by_group: bool = False
    instruction: str = ""
    metric: Metric = "sampled"
    length_normalised: bool = False
    grading: Grading = "rules"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 4096


def load_benchmark(
    benchmark: Benchmark, *, num_shots: int, data_dir: Path | None, limit: int | None = None, seed: int = 0
) -> list[Problem]:
    """Problems of a benchmark, their prompts complete.

    Args:
        benchmark: which.
        num_shots: worked examples before each question.
        data_dir: where its files are looked for first; None for the hub alone.
        limit: that many questions, drawn at random and as evenly from the groups as they allow, in the order of drawing: those of a
            smaller limit are the first ones of a larger. None for all, in the order of the data.
        seed: of that draw.

    Raises:
        UsageError: data that is not there, with the path or command that gives it; fewer examples than `num_shots`.
        RunError: a record that cannot be read, with its place.
    """
    if num_shots < 0 or (limit is not None and limit < 1):
        raise UsageError(f"{benchmark.name}: num_shots must be at least 0 and limit at least 1")
    if benchmark.shots is None:
        examples, problems = _hold_back(benchmark, num_shots, data_dir)
    else:
        problems = _read_all(benchmark, benchmark.questions, data_dir)
        examples = _read_examples(benchmark, num_shots, data_dir, {problem.group for problem in problems})
    if limit is not None:
        problems = draw_problems(problems, limit, seed)
    return [
        _prefixed(one, examples[one.group] if one.group in examples else examples[""]) for one in problems
    ]


def _hold_back(
    benchmark: Benchmark, num_shots: int, data_dir: Path | None
) -> tuple[dict[str, str], list[Problem]]:
    problems = _read_all(benchmark, benchmark.questions, data_dir)
    if num_shots >= len(problems):
        raise UsageError(
            f"{benchmark.name}: {num_shots} shots of {len(problems)} questions leave none to ask"
        )
    if num_shots == 0:
        return {"": _instruction(benchmark, "")}, problems
    texts = tuple(problem.text for problem in problems[:num_shots])
    return {"": _opening(benchmark, Examples("", texts), num_shots)}, problems[num_shots:]


def _instruction(benchmark: Benchmark, group: str) -> str:
    text = benchmark.instruction.replace("{group}", group.replace("_", " "))
    return f"{text}\n\n" if text else ""


def _read_examples(
    benchmark: Benchmark, num_shots: int, data_dir: Path | None, groups: Iterable[str]
) -> dict[str, str]:
    """By group, what opens a prompt with `num_shots` examples; under the empty name where all share them."""
    if num_shots == 0:
        return {group: _instruction(benchmark, group) for group in groups}
    if callable(benchmark.shots):
        found = {group: benchmark.shots(group, data_dir) for group in sorted(groups)}
    else:
        found = _examples_of_sources(benchmark, num_shots, data_dir)
        if benchmark.shots_by_group:
            found = {group: found.get(group, Examples("", ())) for group in sorted(groups)}
    return {group: _opening(benchmark, examples, num_shots, group) for group, examples in found.items()}


def _examples_of_sources(benchmark: Benchmark, num_shots: int, data_dir: Path | None) -> dict[str, Examples]:
    assert isinstance(benchmark.shots, tuple)
    if benchmark.shots_by_group:
        by_group: dict[str, list[str]] = {}
        for problem in _read_all(benchmark, benchmark.shots, data_dir):
            by_group.setdefault(problem.group, []).append(problem.text)
        return {group: Examples("", tuple(texts)) for group, texts in by_group.items()}
    first = [
        [benchmark.read(record).text for record in itertools.islice(read_source(source, data_dir), num_shots)]
        for source in benchmark.shots[:num_shots]  # one example of each of so many sources is enough
    ]
    in_turn = [text for texts in itertools.zip_longest(*first) for text in texts if text is not None]
    return {"": Examples("", tuple(in_turn))}


def _opening(benchmark: Benchmark, examples: Examples, num_shots: int, group: str = "") -> str:
    if len(examples.texts) < num_shots:
        of = f" for {group!r}" if group else ""
        raise UsageError(
            f"{benchmark.name}: {num_shots} shots asked for and {len(examples.texts)} examples there{of}; ask for fewer"
        )
    return examples.preamble + "".join(text + "\n\n" for text in examples.texts[:num_shots])


def _prefixed(problem: Problem, opening: str) -> Problem:
    contexts = _contexts(problem)
    if contexts:
        reference = {**problem.reference, "contexts": [opening + context for context in contexts]}
        return replace(problem, reference=reference)
    return replace(problem, prompt=opening + problem.prompt)


def _contexts(problem: Problem) -> list[str]:
    reference = problem.reference
    return reference.get("contexts", []) if isinstance(reference, Mapping) else []


def _read_all(benchmark: Benchmark, sources: Sequence[Source], data_dir: Path | None) -> list[Problem]:
    """Problems of all sources; a question that comes again has a name of its own, as every record counts."""
    problems: list[Problem] = []
    times: dict[str, int] = {}
    for source in sources:
        for record in read_source(source, data_dir):
            problem = benchmark.read(record)
            question = "\n".join([problem.group, problem.prompt, *problem.choices, *_contexts(problem)])
            times[question] = times.get(question, 0) + 1
            again = f"\n{times[question]}" if times[question] > 1 else ""
            problems.append(
                replace(problem, id=question_id(benchmark.name, question + again), task=benchmark.name)
            )
    return problems


def draw_problems(problems: Sequence[Problem], limit: int, seed: int) -> list[Problem]:
    """At most `limit` problems: of the groups, in a random order, one each in turn; each group in a random order of its own.

    >>> problems = [Problem(id=str(i), task="", difficulty=0, prompt="", solution="", answer="", group="ab"[i % 2]) for i in range(9)]
    >>> drawn = draw_problems(problems, 4, seed=0)
    >>> [one.group for one in drawn], drawn[:3] == draw_problems(problems, 3, seed=0)
    (['b', 'a', 'b', 'a'], True)
    """
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.group, []).append(problem)
    names = sorted(groups)
    orders = [
        [groups[name][place] for place in _any_order(len(groups[name]), seed, name)]
        for name in (names[place] for place in _any_order(len(names), seed, "groups"))
    ]
    in_turn = (one for turn in itertools.zip_longest(*orders) for one in turn if one is not None)
    return list(itertools.islice(in_turn, limit))


def _any_order(size: int, seed: int, name: str) -> list[int]:
    return shuffled_places(size, range(size), seed, "draw", name)
