"""The answer in words: each comparison ends up in the clause that its interval puts it in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.study.fake_study import Size, make_fake_study

from rlprior.statistics.comparisons import Comparison
from rlprior.study.analysis import Analysis, analyse
from rlprior.study.claims import answer_question, describe_family
from rlprior.study.results import Study, load_study

SMALL = Size(
    documents=40,
    questions=40,
    samples=4,
    intermediate_documents=4,
    intermediate_questions=4,
    intermediate_samples=2,
)


def comparison(subject: str, effect: float, *, decided: bool, in_family: bool) -> Comparison:
    half_width = abs(effect) / 2 if decided else 2 * abs(effect)
    return Comparison(
        quantity="Avg@4 after RL (arithmetic)",
        subject=subject,
        reference="CE",
        unit="points",
        effect=effect,
        low=effect - half_width,
        high=effect + half_width,
        level=0.95,
        n=40,
        unit_of_chance="questions",
        decided=decided,
        family_size=4,
        decided_in_family=in_family,
        method="t",
    )


UP = comparison("up", 4.0, decided=True, in_family=True)
DOWN = comparison("down", -6.0, decided=True, in_family=True)
ALONE = comparison("alone", 3.0, decided=True, in_family=False)
SAME = comparison("same", 1.0, decided=False, in_family=False)


def test_a_family_is_sorted_by_what_its_intervals_say() -> None:
    assert describe_family("Avg@4", [UP, DOWN, ALONE, SAME], "CE") == (
        "Avg@4 (points), against CE: higher under up (+4.0); lower under down (−6.0); different under alone (+3.0) if taken alone, "
        "but not after correction; no difference larger than chance under same."
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Analysis]:
    study = load_study(make_fake_study(tmp_path_factory.mktemp("study"), size=SMALL))
    return study, analyse(study)


@pytest.mark.parametrize(
    ("comparisons", "headline"),
    [
        (
            (UP, DOWN, ALONE, SAME),
            "After RL, scores are better under up (+4.0) and worse under down (−6.0) than under cross-entropy; no difference larger "
            "than chance under alone and same (Avg@4 on arithmetic in points, one seed: another may say otherwise).",
        ),
        (
            (DOWN,),
            "After RL, scores are worse under down (−6.0) than under cross-entropy (Avg@4 on arithmetic in points, "
            "one seed: another may say otherwise).",
        ),
        (
            (ALONE, SAME),
            "After RL, none of the 2 objectives compared differs from cross-entropy by more than chance (Avg@4 on arithmetic in "
            "points, one seed: another may say otherwise).",
        ),
        (
            (),
            "No answer yet: reinforcement learning is not finished under two objectives with the same seed.",
        ),
    ],
)
def test_headline(
    material: tuple[Study, Analysis], comparisons: tuple[Comparison, ...], headline: str
) -> None:
    study, analysis = material
    task = replace(analysis.tasks[0], after={**analysis.tasks[0].after, "avg": comparisons})
    assert answer_question(study, replace(analysis, tasks=(task,)), []).headline == headline


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        (
            (UP, DOWN, SAME),
            "RL raised Avg@4 by more than chance under up (+4.0); lowered it under down (−6.0); made no difference to Avg@4 larger "
            "than chance under same (+1.0) (points).",
        ),
        ((DOWN,), "RL lowered Avg@4 by more than chance under down (−6.0) (points)."),
        (
            (ALONE, SAME),
            "RL changed Avg@4 under alone (+3.0) if taken alone, but not after correction; made no difference to Avg@4 larger than "
            "chance under same (+1.0) (points).",
        ),
    ],
)
def test_what_rl_did(material: tuple[Study, Analysis], gains: tuple[Comparison, ...], words: str) -> None:
    study, analysis = material
    (task,) = analysis.tasks
    rows = tuple(
        replace(row, gain={**row.gain, "avg": replace(gain, subject=f"{gain.subject} after RL")})
        for row, gain in zip(task.rows, gains, strict=False)
    )
    findings = dict(answer_question(study, replace(analysis, tasks=(replace(task, rows=rows),)), []).findings)
    assert findings["What RL did on arithmetic"] == words


def test_more_seeds_change_what_cannot_be_concluded(tmp_path: Path) -> None:
    study = load_study(make_fake_study(tmp_path, seeds=(0, 1, 2), size=SMALL))
    limits = answer_question(study, analyse(study), []).limits
    assert limits[0].startswith("3 seeds: the intervals cover the luck of initialisation")
    assert limits[0].endswith("With so few seeds only large differences can be found.")
    assert not any(line.startswith("One seed") for line in limits)


def test_the_headline_is_about_the_first_task_that_the_models_can_do(
    material: tuple[Study, Analysis],
) -> None:
    study, analysis = material
    (task,) = analysis.tasks
    hopeless = replace(task, name="hopeless", baseline_accuracy=1.0)
    assert not hopeless.beats_guessing
    both = replace(analysis, tasks=(hopeless, task))
    answer = answer_question(study, both, [])
    assert "on arithmetic in points" in answer.headline
    assert answer.findings[0][0] == "After RL on arithmetic"
    assert replace(analysis, tasks=(hopeless,)).main_task == hopeless
