"""Commonsense reasoning: HellaSwag, SIQA, PIQA, WinoGrande, OpenBookQA and CommonsenseQA."""

from __future__ import annotations

import re

from rlprior.tasks.benchmarks.benchmark import Benchmark
from rlprior.tasks.benchmarks.prompts import (
    check_choices,
    gold_letter,
    labelled_choices,
    lettered,
    likelihood_problem,
)
from rlprior.tasks.benchmarks.sources import Record, Source
from rlprior.tasks.problem import LETTERS, Problem

_WIKIHOW_MARK = re.compile(r"\[.*?\]")
_LETTER_MARK = re.compile(r"\(([A-Z])\)\s")


def _plain(text: str) -> str:
    """A HellaSwag text without the marks of the WikiHow pages that part of it comes from."""
    return _WIKIHOW_MARK.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_hellaswag(record: Record) -> Problem:
    """`activity_label`, `ctx_a`, `ctx_b`, `endings` and `label`, a position as text."""
    context = f"{record['ctx_a']} {str(record['ctx_b']).capitalize()}"
    endings = check_choices(record, "endings", [_plain(text) for text in record.texts("endings")])
    answer = gold_letter(record, "label", [str(place) for place in range(len(endings))])
    return likelihood_problem(_plain(f"{record.text('activity_label')}: {context}"), endings, answer)


def read_siqa(record: Record) -> Problem:
    """`context`, `question`, `answerA` to `answerC` and `label`, a number from 1 as text."""
    choices = [record.text(f"answer{letter}") for letter in "ABC"]
    prompt = f"Q: {record.text('context')} {record.text('question')}\nA:"
    return likelihood_problem(prompt, choices, gold_letter(record, "label", ["1", "2", "3"]))


def read_piqa(record: Record) -> Problem:
    """`goal`, `sol1`, `sol2` and `label`, a position."""
    choices = [record.text("sol1"), record.text("sol2")]
    prompt = f"Question: {record.text('goal')}\nAnswer:"
    return likelihood_problem(prompt, choices, gold_letter(record, "label", ["0", "1"]))


def read_winogrande(record: Record) -> Problem:
    """`sentence` with a blank `_`, `option1`, `option2` and `answer`: the rest of the sentence is scored after each option."""
    before, blank, after = record.text("sentence").partition("_")
    if not blank:
        raise record.wrong("sentence", "a sentence with a blank, _")
    options = (record.text("option1"), record.text("option2"))
    answer = gold_letter(record, "answer", ["1", "2"])
    contexts = [before + option for option in options]
    continuation = f" {after.strip()}"
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt="",
        solution=contexts[LETTERS.index(answer)] + continuation,
        answer=answer,
        choices=options,
        reference={"contexts": contexts, "continuation": continuation},
    )


def read_openbookqa(record: Record) -> Problem:
    """The hub's `question_stem`, `choices` and `answerKey`, or the original file's columns."""
    stem = record.text("question_stem", "Question Stem")
    if "Choices" in record.fields:
        _, *marked = _LETTER_MARK.split(record.text("Choices"))
        texts = check_choices(record, "Choices", [text.strip() for text in marked[1::2]])
        return likelihood_problem(stem, texts, gold_letter(record, "Answer Key", marked[::2]))
    labels, texts = labelled_choices(record, "choices")
    return likelihood_problem(stem, texts, gold_letter(record, "answerKey", labels))


def read_commonsenseqa(record: Record) -> Problem:
    """`question`, `choices` with `label` and `text`, and `answerKey`; the choices are letters."""
    labels, choices = labelled_choices(record, "choices")
    prompt = f"Question: {record.text('question')}\n{lettered(choices, '{}. {}')}\nAnswer:"
    return likelihood_problem(prompt, LETTERS[: len(choices)], gold_letter(record, "answerKey", labels))


HELLASWAG = Benchmark(
    name="hellaswag",
    title="HellaSwag",
    category="Commonsense Reasoning",
    questions=(Source(repo="Rowan/hellaswag", split="validation", folder="hellaswag"),),
    read=read_hellaswag,
    shots=(Source(repo="Rowan/hellaswag", split="train", folder="hellaswag"),),
    metric="likelihood",
    length_normalised=True,
)
SIQA = Benchmark(
    name="siqa",
    title="SIQA",
    category="Commonsense Reasoning",
    questions=(Source(repo="lighteval/siqa", split="validation", folder="siqa"),),
    read=read_siqa,
    shots=(Source(repo="lighteval/siqa", split="train", folder="siqa"),),
    metric="likelihood",
)
PIQA = Benchmark(
    name="piqa",
    title="PIQA",
    category="Commonsense Reasoning",
    questions=(Source(repo="baber/piqa", split="validation", folder="piqa"),),
    read=read_piqa,
    shots=(Source(repo="baber/piqa", split="train", folder="piqa"),),
    metric="likelihood",
    length_normalised=True,
)
WINOGRANDE = Benchmark(
    name="winogrande",
    title="WinoGrande",
    category="Commonsense Reasoning",
    questions=(
        Source(repo="allenai/winogrande", subset="winogrande_xl", split="validation", folder="winogrande"),
    ),
    read=read_winogrande,
    shots=(Source(repo="allenai/winogrande", subset="winogrande_xl", split="train", folder="winogrande"),),
    metric="likelihood",
)
OPENBOOKQA = Benchmark(
    name="openbookqa",
    title="OpenBookQA",
    category="Commonsense Reasoning",
    questions=(Source(repo="allenai/openbookqa", subset="main", split="test", folder="openbookqa"),),
    read=read_openbookqa,
    shots=(Source(repo="allenai/openbookqa", subset="main", split="train", folder="openbookqa"),),
    metric="likelihood",
    length_normalised=True,
)
COMMONSENSEQA = Benchmark(
    name="commonsenseqa",
    title="CommonsenseQA",
    category="Commonsense Reasoning",
    questions=(Source(repo="tau/commonsense_qa", split="validation", folder="commonsenseqa"),),
    read=read_commonsenseqa,
    shots=(Source(repo="tau/commonsense_qa", split="train", folder="commonsenseqa"),),
    metric="likelihood",
)
