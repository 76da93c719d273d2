"""General knowledge: MMLU, MMLU-Pro, TriviaQA, NaturalQuestions, GPQA and TruthfulQA."""

from __future__ import annotations

from pathlib import Path

from rlprior.config import RunError, UsageError
from rlprior.tasks.benchmarks.benchmark import Benchmark, Examples
from rlprior.tasks.benchmarks.prompts import (
    THE_ANSWER_IS,
    check_choices,
    gold_letter,
    letter_problem,
    lettered,
    likelihood_problem,
    shuffled_choices,
    split_examples,
)
from rlprior.tasks.benchmarks.sources import Record, Source, read_json
from rlprior.tasks.problem import LETTERS, Problem

MMLU_EXAMPLES = "mmlu/flan_cot_prompts.json"


def read_mmlu(record: Record) -> Problem:
    """`subject`, `question`, `choices` and `answer`: a position from 0 on the hub, a letter in files."""
    choices = check_choices(record, "choices", record.texts("choices"))
    prompt = (
        f"Q: {record.text('question')}\n{lettered(choices, '({}) {}', ' ')}\nA: Let's think step by step."
    )
    answer = gold_letter(record, "answer", LETTERS[: len(choices)])
    return letter_problem(prompt, choices, answer, group=record.text("subject"))


def read_mmlu_examples(group: str, data_dir: Path | None) -> Examples:
    """FLAN's worked examples of a subject, from a JSON object of subjects and texts."""
    path = (data_dir or Path("DIR")) / MMLU_EXAMPLES
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file; MMLU's worked examples are not on the hub: give --data-dir with that file, which is "
            "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json of github.com/EleutherAI/lm-evaluation-harness"
        )
    texts = read_json(path)
    if not isinstance(texts, dict) or not isinstance(texts.get(group), str):
        raise RunError(f"{path}: no worked examples of {group!r}; it must be an object of subjects and texts")
    return Examples(*split_examples(texts[group], f"{path}: {group}"))


def read_mmlu_pro(record: Record) -> Problem:
    """`category`, `question`, `options`, `answer` (a letter) and, of an example, `cot_content`."""
    choices = check_choices(record, "options", record.texts("options"))
    prompt = (
        f"Question:\n{record.text('question')}\nOptions:\n{lettered(choices, '{}. {}')}\n"
        "Answer: Let's think step by step."
    )
    worked = str(record.fields.get("cot_content") or "").removeprefix("A: Let's think step by step.").strip()
    answer = gold_letter(record, "answer", LETTERS[: len(choices)])
    return letter_problem(prompt, choices, answer, worked=worked, group=record.text("category"))


def read_triviaqa(record: Record) -> Problem:
    """`question` and `answer`, an object with `value` and `aliases`."""
    answer = record["answer"]
    if not isinstance(answer, dict) or not isinstance(answer.get("value"), str):
        raise record.wrong("answer", "an object with `value` and `aliases`")
    accepted = [answer["value"], *(answer.get("aliases") or ())]
    return _open_question(f"Question: {record.text('question')}\nAnswer:", accepted)


def read_natural_questions(record: Record) -> Problem:
    """`question`, without its question mark, and `answer`, a list of accepted ones."""
    accepted = record.texts("answer")
    if not accepted:
        raise record.wrong("answer", "a list of at least one text")
    return _open_question(f"Q: {record.text('question')}?\nA:", accepted)


def _open_question(prompt: str, accepted: tuple[str, ...] | list[str]) -> Problem:
    answers = list(dict.fromkeys(one.strip() for one in accepted if one.strip()))
    return Problem(
        id="",
        task="",
        difficulty=0,
        prompt=prompt,
        solution=f" {answers[0]}",
        answer=answers[0],
        reference={"aliases": answers[1:]},
    )


def read_gpqa(record: Record) -> Problem:
    """`Question`, `Correct Answer` and `Incorrect Answer 1` to `3`, shuffled; the choices are letters."""
    question, right = record.text("Question"), record.text("Correct Answer")
    others = [record.text(f"Incorrect Answer {number}") for number in (1, 2, 3)]
    choices, answer = shuffled_choices(right, others, question)
    prompt = f"Question: {question}\nChoices:\n{lettered(choices, '({}) {}')}\nAnswer:"
    group = str(record.fields.get("High-level domain") or "")
    return likelihood_problem(prompt, ["(A)", "(B)", "(C)", "(D)"], answer, group=group)


def read_truthfulqa(record: Record) -> Problem:
    """`question` and `mc1_targets`, whose first choice is the right one: shuffled, so that a tie does not find it."""
    targets = record["mc1_targets"]
    pairs = (
        list(zip(targets["choices"], targets["labels"], strict=False)) if isinstance(targets, dict) else []
    )
    right = [choice for choice, label in pairs if label == 1]
    if len(right) != 1:
        raise record.wrong("mc1_targets", "an object with `choices` and `labels`, one of them 1")
    question = record.text("question")
    choices, answer = shuffled_choices(right[0], [choice for choice, label in pairs if label != 1], question)
    return likelihood_problem(f"Q: {question}\nA:", check_choices(record, "mc1_targets", choices), answer)


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    category="General Knowledge",
    questions=(Source(repo="cais/mmlu", subset="all", split="test", folder="mmlu"),),
    read=read_mmlu,
    shots=read_mmlu_examples,
    shots_by_group=True,
    instruction="Multiple-choice questions about {group}. " + THE_ANSWER_IS,
    stop=("\nQ:",),
    max_new_tokens=2048,
)
MMLU_PRO = Benchmark(
    name="mmlu_pro",
    title="MMLU-Pro",
    category="General Knowledge",
    questions=(Source(repo="TIGER-Lab/MMLU-Pro", split="test", folder="mmlu_pro"),),
    read=read_mmlu_pro,
    shots=(Source(repo="TIGER-Lab/MMLU-Pro", split="validation", folder="mmlu_pro"),),
    shots_by_group=True,
    instruction="Multiple-choice questions about {group}. " + THE_ANSWER_IS,
    stop=("\nQuestion:",),
    max_new_tokens=2048,
)
TRIVIAQA = Benchmark(
    name="triviaqa",
    title="TriviaQA",
    category="General Knowledge",
    questions=(
        Source(repo="mandarjoshi/trivia_qa", subset="rc.nocontext", split="validation", folder="triviaqa"),
    ),
    read=read_triviaqa,
    shots=(Source(repo="mandarjoshi/trivia_qa", subset="rc.nocontext", split="train", folder="triviaqa"),),
    grading="alias",
    stop=("\n",),
    max_new_tokens=64,
)
NATURAL_QUESTIONS = Benchmark(
    name="nq_open",
    title="NaturalQuestions",
    category="General Knowledge",
    questions=(
        Source(
            repo="google-research-datasets/nq_open",
            split="validation",
            folder="nq_open",
            files=("nq_open/NQ-open.dev",),
        ),
    ),
    read=read_natural_questions,
    grading="alias",
    stop=("\n",),
    max_new_tokens=64,
)
GPQA, GPQA_DIAMOND = (
    Benchmark(
        name=name,
        title=title,
        category="General Knowledge",
        questions=(
            Source(
                repo="Idavidrein/gpqa", subset=subset, split="train", folder="gpqa", files=(f"gpqa/{subset}",)
            ),
        ),
        read=read_gpqa,
        metric="likelihood",
    )
    for name, title, subset in (
        ("gpqa", "GPQA", "gpqa_main"),
        ("gpqa_diamond", "GPQA-Diamond", "gpqa_diamond"),
    )
)
TRUTHFULQA = Benchmark(
    name="truthfulqa",
    title="TruthfulQA",
    category="General Knowledge",
    questions=(
        Source(
            repo="truthfulqa/truthful_qa", subset="multiple_choice", split="validation", folder="truthfulqa"
        ),
    ),
    read=read_truthfulqa,
    metric="likelihood",
)
