"""The study's answer in plain sentences, every one computed from intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlprior.statistics.comparisons import Comparison, format_number, useful_decimals
from rlprior.study.analysis import Analysis
from rlprior.study.results import STAGE_LABELS, Study
from rlprior.study.sanity import Check

QUESTION = "Which next-token objective leaves the best starting point for reinforcement learning?"
# Below this the quantile of Student's t more than doubles the normal one's width after correction for four comparisons.
ENOUGH_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the report says before any table.

    Attributes:
        question: the study's question.
        headline: one sentence.
        findings: (topic, sentence) pairs, most important first.
        limits: what cannot be concluded.
        doubts: which sanity checks are not met.
        missing: which runs are not finished; empty for a finished study.
    """

    question: str
    headline: str
    findings: tuple[tuple[str, str], ...]
    limits: tuple[str, ...]
    doubts: tuple[str, ...]
    missing: tuple[str, ...]


def answer_question(study: Study, analysis: Analysis, checks: Sequence[Check]) -> Answer:
    """Put the analysis into words; "larger than chance" means after Bonferroni's correction here."""
    baseline = _baseline_label(study)
    findings: list[tuple[str, str]] = []
    for task in sorted(analysis.tasks, key=lambda task: task is not analysis.main_task):
        score, reach = task.score_label("avg"), task.score_label("pass")
        if any(task.rl_gains.values()):
            findings += [
                (f"After RL on {task.name}", describe_family(score, task.after["avg"], baseline)),
                (
                    f"Gain by RL on {task.name}",
                    describe_family(f"Gain in {score}", task.gain["avg"], baseline),
                ),
                (f"What RL did on {task.name}", _describe_gains(score, task.rl_gains["avg"])),
                (f"What RL did to reach on {task.name}", _describe_gains(reach, task.rl_gains["pass"])),
                (f"Reach after RL on {task.name}", describe_family(reach, task.after["pass"], baseline)),
            ]
        if any(row.before for row in task.rows):
            findings.append(
                (f"Before RL on {task.name}", describe_family(score, task.before["avg"], baseline))
            )
    text = analysis.likelihood_comparisons
    for quantity, topic, words in (
        ("entropy", "Diversity before RL", "Entropy on held-out text"),
        ("cross_entropy", "Fit before RL", "Cross-entropy on held-out text"),
        ("excess_entropy", "Confidence before RL", "Entropy minus cross-entropy"),
    ):
        if text[quantity]:
            findings.append((topic, describe_family(words, text[quantity], baseline)))
    return Answer(
        question=QUESTION,
        headline=_headline(analysis, baseline),
        findings=tuple((topic, found) for topic, found in findings if found),
        limits=tuple(_limits(study, analysis)),
        doubts=tuple(
            f"{one.name}: {one.found}, expected {one.expected}; {one.meaning}."
            for one in checks
            if one.verdict != "met"
        ),
        missing=tuple(_describe_missing(study)),
    )


def describe_family(what: str, comparisons: Sequence[Comparison], baseline: str) -> str:
    """Which arms are higher than the baseline, which lower, and which cannot be told apart; empty for no comparisons.

    >>> describe_family("Entropy", [], "CE")
    ''
    """
    if not comparisons:
        return ""
    higher = [_with_effect(one) for one in comparisons if one.decided_in_family and one.effect > 0]
    lower = [_with_effect(one) for one in comparisons if one.decided_in_family and one.effect < 0]
    alone = [_with_effect(one) for one in comparisons if one.decided and not one.decided_in_family]
    same = [one.subject for one in comparisons if not one.decided]
    clauses = [
        words.format(join_names(names))
        for words, names in (
            ("higher under {}", higher),
            ("lower under {}", lower),
            ("different under {} if taken alone, but not after correction", alone),
            ("no difference larger than chance under {}", same),
        )
        if names
    ]
    return f"{what} ({comparisons[0].unit}), against {baseline}: {'; '.join(clauses)}."


def _headline(analysis: Analysis, baseline: str) -> str:
    task = analysis.main_task
    if task is None or not task.after["avg"]:
        return (
            "No answer yet: reinforcement learning is not finished under two objectives with the same seed."
        )
    comparisons = task.after["avg"]
    seeds = {one.n if one.unit_of_chance == "seeds" else 1 for one in comparisons}
    luck = (
        "one seed: another may say otherwise"
        if seeds == {1}
        else f"{join_names(map(str, sorted(seeds)))} seeds"
    )
    where = f"{task.score_label('avg')} on {task.name} in points, {luck}"
    better = [_with_effect(one) for one in comparisons if one.decided_in_family and one.effect > 0]
    worse = [_with_effect(one) for one in comparisons if one.decided_in_family and one.effect < 0]
    rest = [one.subject for one in comparisons if not one.decided_in_family]
    if not better and not worse:
        who = f"none of the {len(rest)} objectives compared" if len(rest) > 1 else rest[0]
        differs = "differs" if len(rest) > 1 else "does not differ"
        return f"After RL, {who} {differs} from {baseline} by more than chance ({where})."
    clauses = [f"better under {join_names(better)}"] * bool(better) + [
        f"worse under {join_names(worse)}"
    ] * bool(worse)
    others = f"; no difference larger than chance under {join_names(rest)}" if rest else ""
    return f"After RL, scores are {' and '.join(clauses)} than under {baseline}{others} ({where})."


def _describe_gains(score: str, comparisons: Sequence[Comparison]) -> str:
    def arm(one: Comparison) -> str:
        return one.subject.removesuffix(" after RL")

    def names(chosen: Callable[[Comparison], bool]) -> list[str]:
        return [f"{arm(one)} ({_effect(one)})" for one in comparisons if chosen(one)]

    up = names(lambda one: one.decided_in_family and one.effect > 0)
    down = names(lambda one: one.decided_in_family and one.effect < 0)
    alone = names(lambda one: one.decided and not one.decided_in_family)
    rest = names(lambda one: not one.decided)
    clauses = [
        clause
        for clause, found in (
            (f"raised {score} by more than chance under {join_names(up)}", up),
            (
                f"lowered it under {join_names(down)}"
                if up
                else f"lowered {score} by more than chance under {join_names(down)}",
                down,
            ),
            (f"changed {score} under {join_names(alone)} if taken alone, but not after correction", alone),
            (f"made no difference to {score} larger than chance under {join_names(rest)}", rest),
        )
        if found
    ]
    return f"RL {'; '.join(clauses)} (points)."


def _limits(study: Study, analysis: Analysis) -> Iterable[str]:
    numbers = sorted({one.n for one in analysis.comparisons if one.unit_of_chance == "seeds"})
    single = any(one.unit_of_chance != "seeds" for one in analysis.comparisons)
    if single:
        who = "Some comparisons have one finished seed" if numbers else "One seed"
        yield (
            f"{who}: the intervals cover the choice of held-out documents and questions, not the luck of initialisation, data "
            "order and RL sampling. A difference called larger than chance may still not come back under another seed; "
            f"run at least {ENOUGH_SEEDS} seeds before you rely on it."
        )
    if numbers:
        who = f"{' or '.join(map(str, numbers))} seeds" + (" for the others" if single else "")
        few = " With so few seeds only large differences can be found." if numbers[0] < ENOUGH_SEEDS else ""
        yield (
            f"{who}: the intervals cover the luck of initialisation, data order and RL sampling; the held-out documents and "
            f"questions are the same for all, so nothing is said about other benchmarks.{few}"
        )
    if analysis.comparisons:
        yield (
            "Several objectives are compared at once. In the sentences above, larger than chance means after Bonferroni's "
            "correction for the objectives within one sentence, not for all sentences together; the intervals in tables and figures "
            "are 95% each, uncorrected. Not told apart does not mean equal."
        )
    if any(row.before or row.after for task in analysis.tasks for row in task.rows):
        yield (
            "All objectives are sampled at one temperature, and they differ in how peaked their predictions are: a difference in "
            "scores may be one of effective temperature. The control for it, the baseline tempered to each objective's entropy, "
            "is not part of this study."
        )
    parameters = study.model.get("num_parameters")
    if parameters:
        yield f"The model has {format_count(parameters)} parameters: what holds at this size need not hold at another."
    warnings = Counter(one.warning for one in analysis.comparisons if one.warning)
    for warning, count in warnings.most_common():
        yield f"In {count} of {len(analysis.comparisons)} comparisons {warning} (marked † in the tables)."


def _describe_missing(study: Study) -> Iterable[str]:
    labels = {arm.name: arm.label for arm in study.arms}
    for stage in study.stages:
        left = [(arm, seed) for arm, seed, where in study.missing if where == stage]
        if left:
            names = join_names(f"{labels[arm]} (seed {seed})" for arm, seed in left)
            yield f"{STAGE_LABELS[stage].capitalize() if stage != 'rl' else 'RL'} is not evaluated yet for {names}."


def _baseline_label(study: Study) -> str:
    return next(arm.label for arm in study.arms if arm.name == study.baseline)


def _effect(one: Comparison) -> str:
    return format_number(one.effect, useful_decimals(one.low, one.high), signed=True)


def _with_effect(one: Comparison) -> str:
    return f"{one.subject} ({_effect(one)})"


def join_names(names: Iterable[str]) -> str:
    """Names with commas and a final "and".

    >>> join_names(["a"]), join_names(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    found = list(names)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def format_count(number: float) -> str:
    """A large count at three digits.

    >>> format_count(651_776), format_count(1_700_000_000)
    ('652 thousand', '1.7 billion')
    """
    for scale, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= scale:
            return f"{number / scale:.3g} {word}"
    return f"{number:g}"
