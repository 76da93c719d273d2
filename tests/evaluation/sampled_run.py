"""Folders of sampled and graded answers, as an evaluation leaves them, and models small enough to score them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlprior.data.tokenizer import save_tokenizer, train_tokenizer
from rlprior.models.causal_lm import build_model, save_model
from rlprior.models.presets import ModelConfig
from rlprior.sampling.grades import Grade, grades_of, write_grades
from rlprior.sampling.pools import Question, questions_of
from rlprior.sampling.store import Sample, SampleStore, StoreKey

KEY = StoreKey(
    model_hash="m", task="sums-1", decoding={"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 8}, seed=0
)
GRADER = "rules-1"
SHAPE = ModelConfig(
    preset="tiny",
    num_layers=1,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.2,  # more than a fresh model's, so that tokens differ in how probable they are
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response and its verdict; a status of None is no grade."""

    text: str
    status: str | None = "wrong"
    extracted: str | None = None
    second_status: str | None = None
    token_ids: tuple[int, ...] = (5, 6, 7)

    def sample(self, problem_id: str, index: int) -> Sample:
        return Sample(
            problem_id=problem_id,
            sample_index=index,
            token_ids=self.token_ids,
            text=self.text,
            finish_reason="length" if self.status == "truncated" else "stop",
            log_prob_nats=-1.5,
            num_tokens=len(self.token_ids),
        )


def write_pool(
    run: Path,
    name: str,
    answers: Mapping[str, Sequence[Answer]],
    questions: Mapping[str, Question] | None = None,
) -> Path:
    """A store with its grades, and its questions where they are given; returns the store's path."""
    path = run / "samples" / f"{name}.jsonl"
    store = SampleStore.open(path, KEY)
    for problem_id, group in answers.items():
        store.append([one.sample(problem_id, index) for index, one in enumerate(group)])
    grades = [
        Grade(problem_id, index, one.status, one.extracted, one.second_status)
        for problem_id, group in answers.items()
        for index, one in enumerate(group)
        if one.status
    ]
    if grades:
        write_grades(grades_of(path), grades, grader=GRADER)
    if questions is not None:
        records: list[dict[str, Any]] = [
            {"id": problem_id, **dataclasses.asdict(one), "choices": []}
            for problem_id, one in questions.items()
        ]
        questions_of(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def question(prompt: str, answer: str = "4", group: str = "") -> Question:
    return Question(prompt=prompt, answer=answer, group=group)


def write_model(
    directory: Path, *, texts: Sequence[str] = ("Q: 2+2\nA: the answer is 4",), seed: int = 0
) -> Path:
    """An untrained model with the tokenizer of these texts, as a Hugging Face folder."""
    tokenizer = train_tokenizer(texts, 300)
    save_tokenizer(tokenizer, directory / "tokenizer")
    model = build_model(SHAPE, tokenizer, max_positions=128, seed=seed)
    save_model(model, directory, tokenizer_directory=directory / "tokenizer")
    return directory


def plain_scores(
    model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Log-probability and entropy of each response token from the model's own logits, in float64."""
    ids = torch.tensor([[*prompt_ids, *response_ids][:-1]])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    rows = log_p[len(prompt_ids) - 1 :]
    log_probs = [float(row[token]) for row, token in zip(rows, response_ids, strict=True)]
    return log_probs, [float(-(row.exp() * row).sum()) for row in rows]
