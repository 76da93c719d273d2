"""Choices by log-likelihood against one dense float64 pass a choice, and the border between prompt and choice."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_study import study_config

from rlprior.config import RunError, UsageError
from rlprior.data.tokenizer import encode_prompt, train_tokenizer
from rlprior.evaluation import choices as choices_module
from rlprior.evaluation.choices import encode_continuation, score_choices
from rlprior.models.causal_lm import build_model
from rlprior.tasks.files import load_problems
from rlprior.tasks.problem import LETTERS, Problem

WORDS = ["river", "mountain", "the", "of", "seven", "blue", "a", "engine", "north", "paper", "Answer", "is"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words with the space before them are tokens; every digit is one."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 20)) + " 12: A B C D" for _ in range(300)]
    return train_tokenizer(texts, 340)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    config = dataclasses.replace(study_config().model, initializer_range=0.2)
    return build_model(config, tokenizer, max_positions=64, seed=0)


def problem(number: int, prompt: str, choices: tuple[str, ...], answer: str = "A", **more: Any) -> Problem:
    return Problem(
        id=f"p{number}",
        task="t",
        difficulty=0,
        prompt=prompt,
        solution="",
        answer=answer,
        choices=choices,
        group=f"g{number % 2}",
        **more,
    )


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """Letters, words, choices of different lengths, a prompt that ends in a space, none at all, contexts that differ."""
    random = np.random.default_rng(1)

    def words(count: int) -> str:
        return " ".join(random.choice(WORDS, count))

    found = [
        problem(n, f"{words(3 + n)}\nAnswer:", (" A", " B", " C", " D"), LETTERS[n % 4]) for n in range(4)
    ]
    found += [
        problem(4 + n, words(6), tuple(f" {words(1 + place)}" for place in range(3)), LETTERS[n % 3])
        for n in range(4)
    ]
    found.append(problem(8, "the answer is ", ("blue", "seven paper"), "B"))
    found.append(problem(9, "", ("river", " of the mountain"), "A"))
    reference = {"contexts": ["the river", "the blue engine north"], "continuation": " is of paper"}
    found.append(problem(10, "", (), "B", reference=reference))
    return found


def dense_log_prob(model: Any, given: list[int], following: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([given + following[:-1]])).logits[0].double()
    rows = logits.log_softmax(-1)[len(given) - 1 :]
    return float(rows[torch.arange(len(following)), torch.tensor(following)].sum())


def dense(model: Any, tokenizer: Any, one: Problem) -> tuple[list[float], list[float], list[int]]:
    """Log-probability of each choice, with and without its prompt, and the characters of each."""
    if one.reference:
        pairs = [(context, one.reference["continuation"]) for context in one.reference["contexts"]]
    else:
        pairs = [(one.prompt, choice) for choice in one.choices]
    given, alone = [], []
    for context, choice in pairs:
        stripped = context.rstrip()
        whole = encode_prompt(tokenizer, context + choice)
        head = encode_prompt(tokenizer, stripped)
        assert whole[: len(head)] == head
        given.append(dense_log_prob(model, head, whole[len(head) :]))
        bare = encode_prompt(tokenizer, choice)
        alone.append(dense_log_prob(model, bare[:1], bare[1:]))
    return given, alone, [len(choice.lstrip()) for _, choice in pairs]


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_every_score_by_a_dense_pass_a_choice(
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    batch_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choices_module, "PROBLEMS_AT_ONCE", 5)
    steps: list[int] = []
    found = score_choices(
        model,
        tokenizer,
        problems,
        headline="unconditional",
        batch_tokens=batch_tokens,
        progress=steps.append,
    )
    assert (found["problem_ids"], found["groups"]) == (
        [one.id for one in problems],
        [one.group for one in problems],
    )
    assert (found["num_samples"], steps, found["num_cut"]) == (1, [5, 5, 1], [0] * 11)
    for number, one in enumerate(problems):
        given, alone, characters = dense(model, tokenizer, one)
        # float32 logits near 10, up to ten tokens
        assert found["log_probs"][number] == pytest.approx(given, rel=1e-5)
        scores = {
            "raw": np.array(given),
            "normalized": np.array(given) / characters,
            "unconditional": np.array(given) - alone,
        }
        for name, values in scores.items():
            if name == "unconditional" and one.id == "p9":
                continue  # without a prompt all of these are 0, and rounding decides
            best = LETTERS[int(values.argmax())]
            assert found[f"num_correct_{name}"][number] == (best == one.answer), (one.id, name)
    assert found["num_correct"] == found["num_correct_unconditional"]
    raw, normalized = found["num_correct_raw"], found["num_correct_normalized"]
    assert 0 < sum(raw) < 11  # neither all right nor all wrong
    assert raw != normalized


@pytest.mark.parametrize("headline", ["raw", "normalized"])
def test_the_headline_is_what_num_correct_counts(
    model: Any, tokenizer: Any, problems: list[Problem], headline: Any
) -> None:
    found = score_choices(model, tokenizer, problems, headline=headline)
    assert found["num_correct"] == found[f"num_correct_{headline}"]
    assert "num_correct_unconditional" not in found


def test_letters_share_one_row(
    model: Any, tokenizer: Any, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four letters after one prompt are four targets of one position: the prompt is read once."""
    rows: list[int] = []
    original = choices_module.last_hidden_states

    def count(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(input_ids))
        return original(model, input_ids)

    monkeypatch.setattr(choices_module, "last_hidden_states", count)
    score_choices(model, tokenizer, problems[:4])
    assert sum(rows) == 4


def test_a_long_prompt_loses_its_beginning_and_is_counted(model: Any, tokenizer: Any) -> None:
    """It keeps the first token, and every token of the choice is predicted from what is left."""
    prompt = " ".join(["engine north"] * 40)
    one = problem(0, prompt, (" blue", " seven of paper"), "B")
    found = score_choices(model, tokenizer, [one, problem(1, "the", (" a", " of"))], max_tokens=16)
    assert found["num_cut"] == [2, 0]
    for place, choice in enumerate(one.choices):
        given, following = encode_continuation(tokenizer, prompt, choice)
        kept = [given[0], *given[len(given) - (16 - len(following)) :]]
        assert len(kept) + len(following) == 17  # 16 are read, the last is not
        assert found["log_probs"][0][place] == pytest.approx(dense_log_prob(model, kept, following), rel=1e-5)
    whole = score_choices(model, tokenizer, [one])
    assert whole["num_cut"] == [2]  # 64 positions, and 80 words
    with pytest.raises(
        RunError, match=r"problem p0: the choice ' seven of paper' has \d tokens, and the model reads 1"
    ):
        score_choices(model, tokenizer, [one], max_tokens=1)


def test_white_space_between_prompt_and_choice_belongs_to_the_choice(tokenizer: Any) -> None:
    for context, choice in (("the answer", " is blue"), ("the answer ", "is blue")):
        given, following = encode_continuation(tokenizer, context, choice)
        assert given == encode_prompt(tokenizer, "the answer")
        assert given + following == encode_prompt(tokenizer, "the answer is blue")


def test_a_choice_that_merges_into_its_prompt_is_tokenized_alone(tokenizer: Any) -> None:
    """ "riv" + "er" may be one token less than "riv" alone has: nothing would be left to score."""
    given, following = encode_continuation(tokenizer, "the mountai", "n")
    assert given == encode_prompt(tokenizer, "the mountai")
    assert following == encode_prompt(tokenizer, "n")[1:]


@pytest.mark.parametrize("answer", ["C", "b", "", "AB"])
def test_an_answer_that_is_no_choice_is_refused(model: Any, tokenizer: Any, answer: str) -> None:
    with pytest.raises(UsageError, match=r"problem p0: 2 choices and the answer"):
        score_choices(model, tokenizer, [problem(0, "the", (" a", " of"), answer)])
    assert set(string.ascii_uppercase) == set(LETTERS)


def test_no_problems_make_empty_columns(model: Any, tokenizer: Any) -> None:
    found = score_choices(model, tokenizer, [])
    assert found["num_correct"] == found["log_probs"] == []


def test_real_questions(real_data: Path, model: Any, tokenizer: Any) -> None:
    """A random model is right as often as chance: 4 choices, 200 questions, five standard errors."""
    problems = [
        dataclasses.replace(one, choices=tuple(f" {choice}" for choice in one.choices))
        for one in load_problems(real_data / "mmlu" / "test.jsonl")[::70][:200]
    ]
    found = score_choices(model, tokenizer, problems, headline="normalized", max_tokens=2048)
    share = sum(found["num_correct"]) / 200
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 200) ** 0.5
