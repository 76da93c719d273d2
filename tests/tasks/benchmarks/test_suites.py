"""Suites hold the papers' benchmarks and numbers of examples, and average as their tables do."""

from __future__ import annotations

import dataclasses

import pytest

from rlprior.tasks.benchmarks.suites import BENCHMARKS, SUITES, Average, Suite, category_averages

BASE, RL = SUITES["paper-base"], SUITES["paper-rl"]
BASE_NAMES = [entry.benchmark for entry in BASE.entries]
AVERAGES = (
    "General Knowledge",
    "Commonsense Reasoning",
    "Knowledge Average",
    "Logic Reasoning",
    "Mathematics",
    "Coding",
    "Reasoning Average",
    "Average",
)
# Last checkpoints of three arms, of tables whose columns the paper did not mix up: 19 scores in the order of the table, then the
# averages that it prints. Tables 2 and 12 print none for commonsense reasoning.
PRINTED = {
    "2a": "25.12 10.06 5.35 16.03 47.49 39.15 71.27 51.62 32.20 20.80 59.26 30.97 26.68 49.52 38.15 15.76 22.35 15.81 41.70"
    " 14.14 - 28.95 38.97 31.45 28.76 33.06 31.41",
    "2b": "26.62 9.02 5.79 16.25 48.33 42.32 71.11 53.83 32.80 20.07 58.80 29.01 27.34 48.76 38.49 16.43 21.83 15.95 41.67"
    " 14.42 - 29.58 38.38 31.38 28.81 32.86 31.55",
    "4a": "29.77 11.16 10.06 28.08 57.78 43.14 75.24 57.38 36.60 38.57 62.08 34.39 27.85 66.78 52.00 21.79 25.62 28.44 60.06"
    " 19.77 51.45 35.61 41.44 41.55 44.25 42.41 39.69",
    "4b": "31.19 11.87 10.42 28.25 57.41 42.68 74.76 56.20 33.60 35.38 63.34 35.15 27.03 65.65 51.19 17.92 24.42 29.32 57.77"
    " 20.43 50.01 35.22 41.84 39.80 43.55 41.73 39.12",
    "4c": "30.34 10.36 10.17 28.00 58.13 43.19 74.59 56.43 35.60 31.37 63.38 34.56 27.49 65.04 48.26 19.36 26.00 27.95 59.97"
    " 19.72 49.89 34.80 41.81 39.67 43.96 41.81 39.01",
    "5a": "36.60 12.26 13.99 37.95 63.26 45.60 75.68 58.64 37.40 51.60 70.29 37.46 29.30 73.64 57.82 21.75 24.58 34.19 73.34"
    " 25.20 55.36 40.28 45.68 44.45 53.77 47.97 44.89",
    "5b": "35.12 12.15 11.96 37.31 63.71 45.09 76.71 58.88 38.20 43.90 67.00 37.29 29.44 76.63 56.76 22.41 24.31 34.66 70.16"
    " 24.14 54.42 39.28 44.58 45.03 52.41 47.34 44.11",
    "6c": "25.89 9.23 5.15 15.50 48.26 42.37 71.11 52.64 31.40 23.34 60.35 30.20 25.59 50.04 37.29 16.87 21.62 16.39 41.62"
    " 13.94 44.85 29.40 38.71 31.46 29.01 33.06 31.59",
    "12a": "39.13 18.23 12.66 35.32 62.29 45.24 76.12 60.46 38.00 53.81 71.34 42.66 39.30 91.69 72.78 26.86 34.13 65.23 85.22"
    " 26.34 - 41.16 51.10 56.37 75.23 60.90 53.00",
    "12c": "39.43 17.50 12.74 34.59 62.16 46.62 75.41 59.98 40.20 50.20 71.25 43.34 37.74 90.11 70.31 25.43 34.11 65.31 85.23"
    " 26.07 - 40.91 50.78 54.99 75.27 60.35 52.57",
}
# printed scores are off by up to 0.005 and so is their mean; printed averages are off by 0.01, as some are cut instead of rounded
ROUNDING = 0.005 + 0.01


def values(averages: dict[str, Average]) -> dict[str, float | None]:
    return {title: average.value for title, average in averages.items()}


@pytest.mark.parametrize("column", PRINTED)
def test_averages_are_those_of_the_papers_tables(column: str) -> None:
    numbers = PRINTED[column].split()
    scores = dict(zip(BASE_NAMES, map(float, numbers[:19]), strict=True))
    printed = {title: float(text) for title, text in zip(AVERAGES, numbers[19:], strict=True) if text != "-"}
    computed = values(category_averages(scores, BASE))
    assert set(computed) == set(AVERAGES)
    assert {title: computed[title] for title in printed} == pytest.approx(printed, abs=ROUNDING)


def test_averages_of_reinforcement_learning_and_of_remit_are_over_all_benchmarks() -> None:
    # Table 14, 1000 steps, Avg@128, in the order of the suite
    steps_1000 = dict(
        zip([one.benchmark for one in RL.entries], (1.62, 2.24, 29.51, 24.56, 52.26, 12.75), strict=True)
    )
    assert values(category_averages(steps_1000, RL)) == {"Average": pytest.approx(20.49, abs=ROUNDING)}
    # ReMiT's Table 2, OLMo-1B
    scores = (61.64, 14.50, 24.55, 32.07, 28.54, 12.80, 9.20, 25.58, 49.23, 17.44)
    remit = SUITES["remit-base"]
    named = dict(zip([one.benchmark for one in remit.entries], scores, strict=True))
    assert values(category_averages(named, remit)) == {"Average": pytest.approx(27.56, abs=ROUNDING)}


def test_an_average_of_a_part_is_none() -> None:
    scores = {name: 0.5 for name in BASE_NAMES if name not in ("bbh", "siqa")}
    averages = category_averages(scores, BASE)
    assert averages["Mathematics"] == Average(0.5)
    assert averages["Logic Reasoning"] == averages["Reasoning Average"] == Average(None, ("bbh",))
    assert averages["Knowledge Average"] == Average(None, ("siqa",))
    assert averages["Average"] == Average(None, ("siqa", "bbh"))
    with pytest.raises(ValueError, match="suite paper-rl has no benchmark gsm8k"):
        category_averages({"gsm8k": 0.5}, RL)


SHOTS = {
    "paper-base": "mmlu 4 mmlu_pro 5 triviaqa 5 nq_open 5 hellaswag 0 siqa 0 piqa 0 winogrande 0 openbookqa 5 commonsenseqa 5 arc_easy 0"
    " arc_challenge 0 bbh 3 gsm8k 4 math500 4 minerva 4 olympiadbench 0 humanevalplus 0 mbppplus 3",
    "paper-rl": "amc23 0 aime24 0 aime25 0 math500 0 minerva 0 olympiadbench 0",
    "remit-base": "gsm8k 8 math 4 gpqa 5 bbh 3 ifeval 0 humaneval 0 mbpp 3 truthfulqa 3 arc_challenge 25 mmlu_pro 5",
    "remit-post": "gsm8k 0 math 0 mbpp 0 mbppplus 0 humaneval 0 humanevalplus 0 arc_challenge 0 gpqa_diamond 0 mmlu_pro 0 ifeval 0",
}


@pytest.mark.parametrize("name", SHOTS)
def test_suites_are_those_of_the_papers(name: str) -> None:
    words = SHOTS[name].split()
    expected = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    entries = SUITES[name].entries
    assert {entry.benchmark: entry.num_shots for entry in entries} == expected
    assert len(entries) == len(expected)
    assert SUITES[name].name == name


def test_the_papers_lengths_and_scores() -> None:
    assert {entry.max_new_tokens for entry in RL.entries} == {16_384}
    by_pass_k = [entry.benchmark for entry in BASE.entries if entry.pass_k == 64]
    assert [BENCHMARKS[name].category for name in by_pass_k] == ["Mathematics"] * 4 + ["Coding"] * 2
    assert {BENCHMARKS[name].max_new_tokens for name in by_pass_k[:4]} == {4096}


def test_names_are_keys_and_declarations_are_sound() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        if benchmark.metric == "likelihood":
            assert not benchmark.stop
        elif name != "ifeval":  # whatever is written answers it
            assert benchmark.stop
        assert all(benchmark.stop)
    assert all(isinstance(suite, Suite) and dataclasses.is_dataclass(suite) for suite in SUITES.values())
