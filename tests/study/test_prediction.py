"""Rank correlations over a study's runs: planted ones are found, chance is not, and halves share no question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.study.fake_study import PAPER_ARMS, SMALL, Effect, Size, make_fake_study

from rlprior.config import UsageError
from rlprior.statistics.estimators import avg_at_m, signal_at_g
from rlprior.study.prediction import (
    _halves,
    predict,
    prediction_cautions,
    prediction_sentences,
    rank_correlation_interval,
    spearman,
)
from rlprior.study.results import load_study


def arms(count: int, *, gain_of: Any) -> dict[str, Effect]:
    abilities = np.linspace(-1.5, 1.5, count)
    return {
        f"a{n}": Effect(f"arm {n}", {"name": "cross_entropy"}, ability=float(x), rl_gain=gain_of(float(x)))
        for n, x in enumerate(abilities)
    }


def by_name(found: Any) -> dict[tuple[str, str], Any]:
    return {(one.predictor, one.outcome): one for one in found}


def test_ranks_are_scipys() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        values, results = random.integers(0, 6, size=(2, 12)).astype(float)
        expected = stats.spearmanr(values, results).statistic
        assert spearman(values, results) == pytest.approx(expected, abs=1e-11)
    assert spearman(np.zeros(5), np.arange(5.0)) == 0.0


def test_a_planted_ability_predicts_the_score_and_not_what_it_does_not_touch(tmp_path: Path) -> None:
    study = load_study(
        make_fake_study(tmp_path, arms(12, gain_of=lambda ability: 0.45), seeds=(0,), size=Size())
    )
    found = predict(study, group_size=16)
    average = by_name(found)["Avg@16", "score after RL"]
    assert average.decided
    assert average.rho > 0.9
    assert average.num_runs == 12
    entropy = by_name(found)["entropy on text", "score after RL"]
    assert not entropy.decided
    lines = prediction_sentences(found)
    assert lines[0].startswith("arithmetic: the score after RL is predicted by ")
    assert "Avg@16 (+" in lines[0]
    assert "entropy on text" in lines[0].split("; not ")[1]


def test_what_predicts_nothing_is_said_to(tmp_path: Path) -> None:
    """Equal arms differ by the luck of their questions alone, which the halves do not share."""
    equal = {f"a{n}": Effect(f"arm {n}", {"name": "cross_entropy"}) for n in range(10)}
    found = predict(load_study(make_fake_study(tmp_path, equal, size=Size(), chance=3)), group_size=16)
    assert not any(one.decided for one in found if one.outcome == "gain by RL")
    assert any("the gain by RL is not predicted by anything" in line for line in prediction_sentences(found))


def test_quantities_and_outcomes_by_hand(tmp_path: Path) -> None:
    study = load_study(make_fake_study(tmp_path, PAPER_ARMS, seeds=(0, 1), size=SMALL))
    found = by_name(predict(study, group_size=16))
    before, after = [], []
    for arm in study.arms:
        for seed in study.seeds:
            pair = [study.final(arm.name, seed, stage) for stage in ("midtrain", "rl")]
            scores = [one.tasks["arithmetic"] for one in pair if one is not None]
            first, second = _halves(scores[0])
            assert sorted([*first, *second]) == list(range(SMALL.questions))
            before.append(signal_at_g(4, scores[0].num_correct, 4)[first].mean())
            averages = [avg_at_m(4, one.num_correct)[second].mean() for one in scores]
            after.append(averages[1] - averages[0])
    one = found["signal@4", "gain by RL"]
    assert one.rho == pytest.approx(spearman(np.array(before), np.array(after)))
    # the number of predictors that vary is what the level is corrected for
    assert one.level == pytest.approx(1 - 0.05 / len({name for name, _ in found}))
    assert (one.low, one.high) == rank_correlation_interval(one.rho, 10, level=one.level)
    assert len(one.seed_rhos) == 2


def test_coverage_of_the_interval() -> None:
    """Of 400 samples of 15 bivariate normal pairs; 0.93 is three standard errors (0.011) below the simulated 0.96."""
    random = np.random.default_rng(0)
    for correlation in (0.0, 0.8):
        truth = 6 / np.pi * np.arcsin(correlation / 2)
        covered = 0
        for _ in range(400):
            x, noise = random.standard_normal((2, 15))
            y = correlation * x + (1 - correlation**2) ** 0.5 * noise
            low, high = rank_correlation_interval(spearman(x, y), 15)
            covered += low <= truth <= high
        assert covered >= 0.92 * 400


def test_too_few_runs_are_refused_and_few_are_cautioned(tmp_path: Path) -> None:
    few = {name: PAPER_ARMS[name] for name in ("ce", "tail")}
    study = load_study(make_fake_study(tmp_path / "two", few, size=SMALL))
    with pytest.raises(
        UsageError, match="2 runs are evaluated before and after RL; a rank correlation needs 4"
    ):
        predict(study, group_size=16)
    study = load_study(make_fake_study(tmp_path / "five", PAPER_ARMS, size=SMALL))
    cautions = prediction_cautions(study, predict(study, group_size=16))
    assert any("5 runs are few" in line for line in cautions)


@pytest.mark.parametrize("num_runs", [4, 10, 25])
def test_perfect_agreement_has_an_interval_that_ends_there(num_runs: int) -> None:
    low, high = rank_correlation_interval(1.0, num_runs)
    exchanged = np.arange(num_runs)
    exchanged[:2] = 1, 0
    nearly = spearman(np.arange(float(num_runs)), exchanged.astype(float))
    assert (low, high) == (pytest.approx(rank_correlation_interval(nearly, num_runs)[0]), 1.0)
    assert rank_correlation_interval(-1.0, num_runs) == (-1.0, pytest.approx(-low))
