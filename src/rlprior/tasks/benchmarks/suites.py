"""Suites of benchmarks with the papers' numbers of examples, and the averages that the papers print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rlprior.tasks.benchmarks import coding, commonsense, instructions, knowledge, logic, mathematics
from rlprior.tasks.benchmarks.benchmark import Benchmark, Category

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        knowledge.MMLU,
        knowledge.MMLU_PRO,
        knowledge.NATURAL_QUESTIONS,
        knowledge.TRIVIAQA,
        knowledge.GPQA,
        knowledge.GPQA_DIAMOND,
        knowledge.TRUTHFULQA,
        commonsense.HELLASWAG,
        commonsense.SIQA,
        commonsense.PIQA,
        commonsense.WINOGRANDE,
        commonsense.OPENBOOKQA,
        commonsense.COMMONSENSEQA,
        logic.ARC_EASY,
        logic.ARC_CHALLENGE,
        logic.BBH,
        logic.MUSR,
        mathematics.GSM8K,
        mathematics.MATH,
        mathematics.MATH500,
        mathematics.MINERVA,
        mathematics.OLYMPIADBENCH,
        mathematics.AMC23,
        mathematics.AIME24,
        mathematics.AIME25,
        coding.HUMANEVAL,
        coding.HUMANEVALPLUS,
        coding.MBPP,
        coding.MBPPPLUS,
        instructions.IFEVAL,
    )
}


@dataclass(frozen=True)
class Entry:
    """A benchmark in a suite.

    Attributes:
        benchmark: its name.
        num_shots: worked examples before each question.
        max_new_tokens: limit of a sampled answer; None for the benchmark's own.
        pass_k: what the paper's averages count is Pass@k; None for accuracy.
        stop: strings that end a sampled answer; None for the benchmark's own.
    """

    benchmark: str
    num_shots: int
    max_new_tokens: int | None = None
    pass_k: int | None = None
    stop: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Benchmarks that are reported together.

    Attributes:
        name: on the command line.
        title: of its table.
        entries: in the order of the paper's table.
        by_category: the overall average is the mean of the categories' averages; or else it is the mean of all benchmarks.
    """

    name: str
    title: str
    entries: tuple[Entry, ...]
    by_category: bool = False


_LONG = 16_384

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="paper-base",
            title="Base models, 19 benchmarks",
            by_category=True,
            entries=(
                Entry("mmlu", 4),
                Entry("mmlu_pro", 5),
                Entry("nq_open", 5),
                Entry("triviaqa", 5),
                Entry("hellaswag", 0),
                Entry("siqa", 0),
                Entry("piqa", 0),
                Entry("winogrande", 0),
                Entry("openbookqa", 5),
                Entry("commonsenseqa", 5),
                Entry("arc_easy", 0),
                Entry("arc_challenge", 0),
                Entry("bbh", 3),
                Entry("gsm8k", 4, pass_k=64),
                Entry("math500", 4, pass_k=64),
                Entry("minerva", 4, pass_k=64),
                Entry("olympiadbench", 0, pass_k=64),
                Entry("humanevalplus", 0, pass_k=64),
                Entry("mbppplus", 3, pass_k=64),
            ),
        ),
        Suite(
            name="paper-rl",
            title="Models after reinforcement learning, 6 benchmarks",
            entries=tuple(
                Entry(name, 0, _LONG)
                for name in ("aime24", "aime25", "amc23", "olympiadbench", "math500", "minerva")
            ),
        ),
        Suite(
            name="remit-base",
            title="Base models, 10 benchmarks",
            entries=(
                Entry("gsm8k", 8),
                Entry("math", 4),
                Entry("gpqa", 5),
                Entry("bbh", 3),
                Entry("ifeval", 0),  # its data hold no answers to make the paper's three examples of
                Entry("humaneval", 0),
                Entry("mbpp", 3),
                Entry("truthfulqa", 3),
                Entry("arc_challenge", 25),
                Entry("mmlu_pro", 5),
            ),
        ),
        Suite(
            name="remit-post",
            title="Post-trained models, 10 benchmarks, no examples",
            entries=tuple(
                # a fenced block with a function holds what would end a base model's continuation
                Entry(name, 0, stop=() if name.startswith("humaneval") else None)
                for name in (
                    "gsm8k",
                    "math",
                    "mbpp",
                    "mbppplus",
                    "humaneval",
                    "humanevalplus",
                    "arc_challenge",
                    "gpqa_diamond",
                    "mmlu_pro",
                    "ifeval",
                )
            ),
        ),
        Suite(
            name="remit-extra",
            title="Commonsense and multi-step reasoning, 7 benchmarks",
            entries=tuple(
                Entry(name, 0)
                for name in (
                    "hellaswag",
                    "piqa",
                    "siqa",
                    "winogrande",
                    "openbookqa",
                    "commonsenseqa",
                    "musr",
                )
            ),
        ),
    )
}

ABILITIES: dict[str, tuple[Category, ...]] = {
    "Knowledge Average": ("General Knowledge", "Commonsense Reasoning"),
    "Reasoning Average": ("Logic Reasoning", "Mathematics", "Coding"),
}
"""What the five categories are averaged to."""


@dataclass(frozen=True)
class Average:
    """A mean of scores, and the benchmarks it would need and has not got; without them there is no mean.

    Attributes:
        value: the mean; None where a benchmark is missing.
        missing: names of those benchmarks.
    """

    value: float | None
    missing: tuple[str, ...] = ()


def category_averages(scores: Mapping[str, float], suite: Suite) -> dict[str, Average]:
    """The averages that a suite's table prints, by their titles.

    By category: the mean of each category's benchmarks; `Knowledge Average` the mean of two categories' means, `Reasoning Average`
    of three; `Average` the mean of all five. Or else `Average` alone, the mean of all benchmarks. An average of part of what it
    stands for would be another quantity under the same name, so there is none.

    Args:
        scores: by name of benchmark, all in one unit.
        suite: that they are of.

    Raises:
        ValueError: a score of a benchmark that is not in the suite.

    Source: Tables 2 to 13 of Diversity or Precision; Tables 14 to 23 and ReMiT's Tables 2 to 4 average all benchmarks.
    """
    names = [entry.benchmark for entry in suite.entries]
    if unknown := sorted(set(scores) - set(names)):
        raise ValueError(f"suite {suite.name} has no benchmark {', '.join(unknown)}")
    if not suite.by_category:
        return {"Average": _mean_of_scores(scores, names)}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(BENCHMARKS[name].category, []).append(name)
    averages = {category: _mean_of_scores(scores, members[category]) for category in members}
    for title, categories in (*ABILITIES.items(), ("Average", tuple(members))):
        parts = [averages[category] for category in categories]
        missing = tuple(name for part in parts for name in part.missing)
        values = [part.value for part in parts if part.value is not None]
        averages[title] = Average(None if missing else fmean(values), missing)
    return averages


def _mean_of_scores(scores: Mapping[str, float], names: Sequence[str]) -> Average:
    missing = tuple(name for name in names if name not in scores)
    return Average(None if missing else fmean(scores[name] for name in names), missing)
