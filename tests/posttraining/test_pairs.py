"""Pairs of graded samples: the rule by enumeration, its draws, and stores that cannot be used."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from tests.posttraining.graded import make_sample, write_store

from rlprior.config import RunError, UsageError
from rlprior.posttraining.pairs import PairCounts, encode_pairs, make_pairs, read_graded
from rlprior.sampling.grades import Grade, grades_of
from rlprior.sampling.store import Sample


def graded(**problems: str) -> tuple[list[Sample], list[Grade]]:
    """Samples of each problem, a letter each: c(orrect), w(rong), u(nparsable), t(runcated), T for timed out; all texts differ."""
    statuses = {"c": "correct", "w": "wrong", "u": "unparsable", "t": "truncated", "T": "timed_out"}
    places = [
        (problem, i, letter) for problem, letters in problems.items() for i, letter in enumerate(letters)
    ]
    samples = [make_sample(problem, index, f"{problem}{index}") for problem, index, _ in places]
    return samples, [Grade(problem, index, statuses[letter], None) for problem, index, letter in places]


def indices(pairs: list, problem_id: str) -> list[tuple[int, int]]:
    return [
        (pair.chosen.sample_index, pair.rejected.sample_index)
        for pair in pairs
        if pair.problem_id == problem_id
    ]


def test_every_correct_answer_meets_every_wrong_one() -> None:
    samples, grades = graded(p="cwcuwtTw", q="cc", r="wwu", s="uuT", t="wc")
    pairs, counts = make_pairs(samples, grades, max_pairs_per_prompt=99, seed=0)
    assert indices(pairs, "p") == list(product([0, 2], [1, 4, 7]))
    assert indices(pairs, "t") == [(1, 0)]
    assert [pair.problem_id for pair in pairs] == ["p"] * 6 + ["t"]
    assert counts == PairCounts(
        num_prompts=5,
        num_prompts_paired=2,
        num_prompts_without_rejected=1,
        num_prompts_without_correct=2,
        num_duplicates=0,
        num_pairs=7,
    )
    assert str(counts) == "7 pairs from 2 of 5 prompts (2 without a correct answer, 1 without one to reject)"


@pytest.mark.parametrize(
    ("rejected", "expected"),
    [(("wrong",), [1]), (("unparsable",), [2]), (("wrong", "truncated"), [1, 3])],
)
def test_what_is_rejected_is_a_choice(rejected: tuple[str, ...], expected: list[int]) -> None:
    samples, grades = graded(p="cwutT")
    pairs, _ = make_pairs(samples, grades, rejected=rejected, max_pairs_per_prompt=99, seed=0)
    assert indices(pairs, "p") == [(0, index) for index in expected]


def test_a_text_counts_once_in_each_prompt() -> None:
    texts = ["4", "5", "4", "5", "6", "4"]
    samples = [make_sample(problem, i, text) for problem in "pq" for i, text in enumerate(texts)]
    grades = [
        Grade(one.problem_id, one.sample_index, "correct" if one.text == "4" else "wrong", None)
        for one in samples
    ]
    pairs, counts = make_pairs(samples, grades, max_pairs_per_prompt=99, seed=0)
    assert indices(pairs, "p") == indices(pairs, "q") == [(0, 1), (0, 4)]
    assert counts.num_duplicates == 6


def test_the_draws_are_without_replacement_and_depend_on_seed_and_problem_alone() -> None:
    samples, grades = graded(p="ccccwwww", q="ccccwwww")
    pairs, counts = make_pairs(samples, grades, max_pairs_per_prompt=5, seed=3)
    drawn = indices(pairs, "p")
    assert len(drawn) == len(set(drawn)) == 5
    assert counts.num_pairs == 10
    assert drawn != indices(pairs, "q"), "each problem has a stream of its own"
    alone, _ = make_pairs(samples[8:], grades[8:], max_pairs_per_prompt=5, seed=3)
    assert indices(alone, "q") == indices(pairs, "q"), "other problems do not change it"
    other, _ = make_pairs(samples, grades, max_pairs_per_prompt=5, seed=4)
    assert indices(other, "p") != drawn


def test_each_pair_is_as_likely_as_any_other() -> None:
    samples, grades = graded(p="ccwwww")
    times = Counter(
        place
        for seed in range(800)
        for place in indices(make_pairs(samples, grades, max_pairs_per_prompt=2, seed=seed)[0], "p")
    )
    # 800 draws of 2 out of 8: 200 each, standard deviation 12; five of them are exceeded by chance once in 10^6
    assert set(times) == set(product([0, 1], [2, 3, 4, 5]))
    assert all(140 < count < 260 for count in times.values()), times


def test_tokens_are_those_that_were_drawn() -> None:
    samples, grades = graded(p="cw")
    pairs, _ = make_pairs(samples, grades, max_pairs_per_prompt=1, seed=0)
    (example,) = encode_pairs(pairs, {"p": [0, 7]}, where="store")
    assert example == {
        "prompt_ids": [0, 7],
        "chosen_ids": list(samples[0].token_ids),
        "rejected_ids": list(samples[1].token_ids),
    }
    with pytest.raises(UsageError, match=r"store: answers problem p, which dpo\.task does not have"):
        encode_pairs(pairs, {"q": [0]}, where="store")


def test_a_store_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    samples, grades = graded(p="cw", q="wc")
    path = write_store(tmp_path / "store.jsonl", samples, grades)
    with path.open("a") as file:
        file.write('{"samples": [{"torn')  # as of a run that is writing it
    before = path.read_bytes()
    assert read_graded(path) == (samples, grades)
    assert path.read_bytes() == before


def test_stores_that_cannot_be_used(tmp_path: Path) -> None:
    samples, grades = graded(p="cw")
    path = write_store(tmp_path / "store.jsonl", samples, grades)
    with pytest.raises(UsageError, match=r"other\.jsonl: no such file; give the store of samples"):
        read_graded(tmp_path / "other.jsonl")
    whole = grades_of(path).read_text()
    for damaged in ("", "{}\n", whole[: whole.rindex("{")], "no\n"):
        grades_of(path).write_text(damaged)
        with pytest.raises(RunError, match=r"store\.grades\.jsonl: not a whole file of grades"):
            read_graded(path)
    grades_of(path).unlink()
    with pytest.raises(UsageError, match=r"store\.grades\.jsonl: no such file"):
        read_graded(path)
    write_store(tmp_path / "fewer.jsonl", samples[:1], grades)
    with pytest.raises(RunError, match=r"grades samples that fewer\.jsonl does not hold"):
        read_graded(tmp_path / "fewer.jsonl")
    path.write_text("no\n")
    grades_of(path).write_text(whole)
    with pytest.raises(RunError, match=r"store\.jsonl: not a store of samples, or damaged"):
        read_graded(path)
