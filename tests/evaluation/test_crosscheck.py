"""Stored responses score the same in lm-evaluation-harness, or each difference has its reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.small_study import study_config

from rlprior.cli import main
from rlprior.config import RunError, UsageError
from rlprior.data.tokenizer import train_tokenizer
from rlprior.evaluation import harness
from rlprior.evaluation.choices import score_choices
from rlprior.evaluation.crosscheck import Reason, crosscheck, describe_crosscheck
from rlprior.evaluation.harness import TASK_FILES
from rlprior.models.causal_lm import build_model
from rlprior.sampling.answers import questions_of, write_questions
from rlprior.sampling.grades import Grade, grade, grades_of, write_grades
from rlprior.sampling.store import Sample, SampleStore, StoreKey
from rlprior.tasks.benchmarks.benchmark import load_benchmark
from rlprior.tasks.benchmarks.suites import BENCHMARKS
from rlprior.tasks.problem import Problem, Status
from rlprior.tasks.verifier import RULES

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'rlprior[harness]'",
)

AGREE = ""
# Responses to a question whose answer is 1200, whether they are correct here, and why each scorer says otherwise, in this order:
GSM8K_SCORERS = (
    "gsm8k strict-match",  # "#### N"
    "gsm8k flexible-extract",  # the last number
    "gsm8k_cot strict-match",  # "The answer is N."
    "gsm8k_cot flexible-extract",
)
GSM8K = [
    # one statement, in forms that each of them knows or not
    (" 2 * 600 = 1200\n#### 1200", True, AGREE, AGREE, "not_found", AGREE),
    (" 2 * 600 = 1200. The answer is 1200.", True, "not_found", AGREE, AGREE, AGREE),
    (" The answer is 1,200.", True, "not_found", AGREE, AGREE, AGREE),
    (" #### 1,200", True, AGREE, AGREE, "not_found", AGREE),
    (" #### $1200", True, "not_found", AGREE, "not_found", AGREE),
    (" The answer is $1,200.", True, "not_found", AGREE, "not_found", AGREE),
    (" The answer is **1200**.", True, "not_found", AGREE, "not_found", AGREE),
    (" the answer is 1200.", True, "not_found", AGREE, "not_found", AGREE),
    (" The final answer is 1200.", True, "not_found", AGREE, "not_found", AGREE),
    (r" so \boxed{1200}", True, "not_found", AGREE, "not_found", AGREE),
    (r" so $\boxed{1200}$.", True, "not_found", "last_number", "not_found", "last_number"),
    (" #### 1200 dollars", True, AGREE, AGREE, "not_found", AGREE),
    (" The answer is 1200 dollars.", True, "not_found", AGREE, AGREE, AGREE),
    # their pattern of the second task wants a character after the number, and takes a digit where there is none
    (" The answer is 1200", True, "not_found", AGREE, "part", AGREE),
    (" The answer is 2400/2.", True, "not_found", "part", "part", "part"),
    (" The answer is 1200 or 1300.", False, AGREE, AGREE, "part", AGREE),
    # values and texts
    (" #### 1200.00", True, "spelling", "spelling", "not_found", "spelling"),
    (" The answer is 1200.0.", True, "not_found", "spelling", "spelling", "spelling"),
    (" The answer is 12,00.", False, AGREE, "deleted_characters", "deleted_characters", "deleted_characters"),
    # several statements, and text after the answer
    (" #### 7\n#### 1200", True, "first", AGREE, "not_found", AGREE),
    (" #### 1200\n#### 7", False, "first", AGREE, AGREE, AGREE),
    (" The answer is 1200.\nNo.\nThe answer is 7.", False, AGREE, AGREE, "first", AGREE),
    (r" \boxed{1200} #### 7", True, "elsewhere", "last_number", "not_found", "last_number"),
    (" The answer is 7.\nSold at 1200", False, AGREE, "last_number", AGREE, "last_number"),
    (" The answer is 1200. There are 7 of them.", True, "not_found", "last_number", AGREE, "last_number"),
    # no statement
    (" So it is 1200", False, AGREE, "not_stated", AGREE, "not_stated"),
    (" 1200 #### ", False, AGREE, "not_stated", AGREE, "not_stated"),
    (" I do not know.", False, AGREE, AGREE, AGREE, AGREE),
    ("", False, AGREE, AGREE, AGREE, AGREE),
    # wrong everywhere
    (" #### 7", False, AGREE, AGREE, AGREE, AGREE),
    (" The answer is -1200.", False, AGREE, AGREE, AGREE, AGREE),
    (" #### 120", False, AGREE, AGREE, AGREE, AGREE),
    # the next question, at which one of their tasks or the other stops
    (" #### 1200\nQ: What?\nA: 9 #### 7", False, "first", AGREE, AGREE, "stop_string"),
    (" #### 1200\nQuestion: What?\nAnswer: 9 #### 7", False, "stop_string", "stop_string", AGREE, AGREE),
]
# The same for a question whose right choice of 2, 4, 6 and 8 is (B) 4.
MMLU_SCORERS = ("mmlu_flan_cot_fewshot get-answer",)
MMLU = [
    (" Twice two. The answer is (B).", True, AGREE),
    (" The answer is (B)", True, AGREE),
    (" The answer is B.", True, AGREE),
    (" the answer is b.", True, AGREE),
    (" The answer is B", True, "part"),
    (" The answer is (B) 4.", True, "spelling"),
    (" The answer is (B). It is twice two.", True, "more"),
    (r" \boxed{B}", True, "not_found"),
    (" (B)", True, "not_found"),
    (" #### B", True, "not_found"),
    (" The answer is: (B).", True, "not_found"),
    (" The answer is (A).\nNo, the answer is (B).", True, "first"),
    (" The answer is (B).\nNo, the answer is (A).", False, "first"),
    (r" \boxed{B} and the answer is (A).", True, "elsewhere"),
    (" Therefore, answer is (B).", False, "not_stated"),
    (" The answer is (C).", False, AGREE),
    (" The answer is (A) or (B).", False, AGREE),
    (" The answer is 4.", False, AGREE),
    ("", False, AGREE),
    (" The answer is (B).</s> The answer is (A).", False, "stop_string"),
]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "What is 600?", "answer": "#### 600"},
        {"question": "What is 2 * 600? ", "answer": "2 * 600 = <<2*600=1200>>1,200\n#### 1,200"},
        {"question": "1+1?", "answer": "#### 2"},
    ],
    "mmlu": [
        {"subject": "a", "question": "What is 2 * 2?", "choices": ["4", "2", "6", "8"], "answer": "A"},
        {"subject": "a", "question": "What is 2 * 2?", "choices": ["2", "4", "6", "8 "], "answer": 1},
    ],
}
ASKED = {"gsm8k": 1, "mmlu": 1}  # of these records


def write_run(
    run: Path,
    name: str,
    problems: Sequence[Problem],
    responses: Sequence[Sequence[str]],
    *,
    finish_reason: Any = "stop",
    regrade: Callable[[Grade], Grade] = lambda one: one,
) -> Path:
    """The folder of an evaluation that drew these responses to each problem; returns its store."""
    samples = [
        Sample(
            problem_id=problem.id,
            sample_index=index,
            token_ids=(1,),
            text=text,
            finish_reason=finish_reason,
            log_prob_nats=-1.0,
            num_tokens=1,
        )
        for problem, texts in zip(problems, responses, strict=True)
        for index, text in enumerate(texts)
    ]
    path = run / "samples" / f"{name}.jsonl"
    SampleStore.open(path, StoreKey(model_hash="m", task=name, decoding={}, seed=0)).append(samples)
    by_id = {problem.id: problem for problem in problems}
    grades = [regrade(one) for one in grade(samples, by_id, RULES.grade)]
    write_grades(grades_of(path), grades, grader="rules")
    write_questions(questions_of(path), problems)
    return path


def write_small_run(run: Path, name: str, texts: Sequence[str], **options: Any) -> Path:
    """The same of one question of `RECORDS`."""
    problems = load_benchmark(BENCHMARKS[name], num_shots=0, data_dir=write_data(run / "data"))
    return write_run(run, name, [problems[ASKED[name]]], [texts], **options)


def write_data(data_dir: Path, **records: Sequence[dict[str, Any]]) -> Path:
    """The files of both benchmarks, `RECORDS` where nothing else is given."""
    for name, rows in (RECORDS | records).items():
        (data_dir / name).mkdir(parents=True, exist_ok=True)
        (data_dir / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data_dir


def scorers_of(report: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {f"{one['task']} {one['filter']}": one for one in report["benchmarks"][name]["scorers"]}


@needs_harness
@pytest.mark.parametrize(
    ("name", "scorers", "table"), [("gsm8k", GSM8K_SCORERS, GSM8K), ("mmlu", MMLU_SCORERS, MMLU)]
)
def test_each_response_scores_the_same_or_is_explained(
    name: str, scorers: Sequence[str], table: Sequence[tuple[Any, ...]], tmp_path: Path
) -> None:
    write_small_run(tmp_path / "run", name, [text for text, *_ in table])
    found = scorers_of(crosscheck(tmp_path / "run", write_data(tmp_path / "data")), name)
    assert tuple(found) == scorers
    here = [row[1] for row in table]
    for scorer, *expected in zip(scorers, *(row[2:] for row in table), strict=True):
        one = found[scorer]
        reasons = dict.fromkeys(range(len(table)), AGREE)
        reasons |= {item["sample_index"]: item["reason"] for item in one["differing"]}
        assert {table[i][0]: reason for i, reason in reasons.items()} == {
            table[i][0]: reason for i, reason in enumerate(expected)
        }, scorer
        there = [is_correct != bool(reason) for is_correct, reason in zip(here, expected, strict=True)]
        assert one["ours"] == pytest.approx(sum(here) / len(here))
        assert one["theirs"] == pytest.approx(sum(there) / len(there))
        assert one["difference"] == pytest.approx(one["ours"] - one["theirs"])
        assert one["num_responses"] == len(table)
        assert {i: there[i] for i in reasons if reasons[i]} == {
            item["sample_index"]: item["they_count_it"] for item in one["differing"]
        }


@needs_harness
def test_reasons_that_are_not_in_the_response(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    # a cut response: the next digit could change its answer
    write_small_run(
        tmp_path / "cut",
        "gsm8k",
        [" #### 1200", " #### 1200 = 1200\nsince", " #### 7"],
        finish_reason="length",
    )
    found = scorers_of(crosscheck(tmp_path / "cut", data), "gsm8k")
    assert [item["reason"] for item in found["gsm8k strict-match"]["differing"]] == ["length_limit"]

    # a verifier that did not finish
    def time_out(one: Grade) -> Grade:
        return Grade(one.problem_id, one.sample_index, Status.TIMED_OUT, None)

    write_small_run(tmp_path / "late", "gsm8k", [" #### 1200", " #### 7"], regrade=time_out)
    found = scorers_of(crosscheck(tmp_path / "late", data), "gsm8k")
    assert found["gsm8k strict-match"]["reasons"] == {"no_verdict": 1}

    # gold answers that differ explain whatever follows
    other = [{"question": "What is 2 * 600?", "answer": "#### 7"}]
    changed = write_data(tmp_path / "changed", gsm8k=other, mmlu=[RECORDS["mmlu"][1] | {"answer": "D"}])
    write_small_run(tmp_path / "run", "gsm8k", [" #### 1200", " #### 7", " #### 8"])
    write_small_run(tmp_path / "run", "mmlu", [" The answer is (B).", " The answer is (A)."])
    report = crosscheck(tmp_path / "run", changed)
    assert scorers_of(report, "gsm8k")["gsm8k strict-match"]["reasons"] == {"gold": 2}
    assert scorers_of(report, "mmlu")["mmlu_flan_cot_fewshot get-answer"]["reasons"] == {"gold": 1}


def test_every_reason_is_met() -> None:
    met = {reason for row in [*GSM8K, *MMLU] for reason in row[2:]} | {"length_limit", "no_verdict", "gold"}
    assert met == {AGREE, *(reason.name.lower() for reason in Reason)}


@needs_harness
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = tmp_path / "run", write_data(tmp_path / "data")
    write_small_run(run, "gsm8k", [" #### 1200", " #### 1200.0", " #### 7", " so 1200"])
    write_small_run(run, "mmlu", [" The answer is (B).", " The answer is (A)."])
    assert main(["crosscheck", str(run), "--data-dir", str(data)]) == 0
    report = json.loads((run / "crosscheck.json").read_text())
    printed = capsys.readouterr().out
    assert printed.startswith(describe_crosscheck(report))
    assert "gsm8k: 4 responses to 1 question\n" in printed
    assert (
        "gsm8k 3.0, strict-match: ours 0.5000, theirs 0.2500, difference +0.2500; 1 response differs"
        in printed
    )
    assert "     1 one answer, compared as a value here and as text there" in printed
    assert (
        "mmlu_flan_cot_fewshot 2.0, get-answer: ours 0.5000, theirs 0.5000, difference +0.0000; all agree"
        in printed
    )
    assert str(run / "crosscheck.json") in printed
    other = tmp_path / "elsewhere.json"
    assert main(["crosscheck", str(run), "--data-dir", str(data), "--out", str(other)]) == 0
    assert json.loads(other.read_text()) == report
    (item,) = scorers_of(report, "gsm8k")["gsm8k strict-match"]["differing"]
    assert item == {
        "problem_id": load_benchmark(BENCHMARKS["gsm8k"], num_shots=0, data_dir=data)[1].id,
        "sample_index": 1,
        "reason": "spelling",
        "our_status": "correct",
        "our_answer": "1200",
        "their_answer": "1200.0",
        "they_count_it": False,
        "gold": "1,200",
        "response_end": " #### 1200.0",
    }


@needs_harness
def test_mistakes(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with pytest.raises(UsageError, match=r"no samples/gsm8k\.jsonl or samples/mmlu\.jsonl; give the folder"):
        crosscheck(tmp_path, data)
    path = write_small_run(tmp_path / "run", "gsm8k", [" #### 1200"])
    with pytest.raises(UsageError, match=r"give --data-dir .* with .*gsm8k.test\.jsonl"):
        crosscheck(tmp_path / "run", tmp_path)
    other = write_data(tmp_path / "other", gsm8k=RECORDS["gsm8k"][::2])
    with pytest.raises(RunError, match=r"does not hold the question of problem .*600.*; give the --data-dir"):
        crosscheck(tmp_path / "run", other)
    wrong = write_data(tmp_path / "wrong", gsm8k=[{"question": "x"}])
    with pytest.raises(UsageError, match=r"test\.jsonl:1"):
        crosscheck(tmp_path / "run", wrong)
    for beside in (questions_of(path), grades_of(path)):
        whole = beside.read_bytes()
        beside.unlink()
        with pytest.raises(RunError, match="its grades or questions are not all there; evaluate again"):
            crosscheck(tmp_path / "run", data)
        beside.write_bytes(whole)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"pip install 'rlprior\[harness\]'"):
        crosscheck(tmp_path, tmp_path)


FORMS = {"gsm8k": (" So.\n#### {}", " So. The answer is {}."), "mmlu": (" So. The answer is ({}).",)}


@needs_harness
@pytest.mark.parametrize(("name", "every"), [("gsm8k", 10), ("mmlu", 50)])
def test_real_questions(name: str, every: int, real_data: Path, tmp_path: Path) -> None:
    """Their gold answers score 1 and others 0, on both sides, in each task's own form."""
    problems = load_benchmark(BENCHMARKS[name], num_shots=0, data_dir=real_data)[::every]
    for (task, _), form in zip(TASK_FILES[name].items(), FORMS[name], strict=True):
        responses = []
        for problem in problems:
            gold = problem.written_answer or problem.answer
            wrong = "DABC"["ABCD".index(gold)] if problem.choices else f"{gold}1"
            responses.append([form.format(gold), form.format(wrong), " I pass"])
        write_run(tmp_path / task, name, problems, responses)
        scorers = crosscheck(tmp_path / task, real_data)["benchmarks"][name]["scorers"]
        found = [(one["ours"], one["theirs"], one["differing"]) for one in scorers if one["task"] == task]
        assert found
        assert all(one == (1 / 3, 1 / 3, []) for one in found)


@needs_harness
def test_choices_by_log_likelihood() -> None:
    """`score_choices` has its model's log-likelihoods, and its task's acc and acc_norm of them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    words = ["river", "mountain", "the", "of", "seven", "blue", "a", "engine", "north", "paper"]
    random = np.random.default_rng(0)
    tokenizer: Any = train_tokenizer([" ".join(random.choice(words, 20)) for _ in range(200)], 320)
    config = dataclasses.replace(study_config().model, initializer_range=0.2)
    model = build_model(config, tokenizer, max_positions=64, seed=0).eval()
    documents, problems = [], []
    for number in range(24):
        stem = " ".join(random.choice(words, 3 + number % 5))
        choices = [" ".join(random.choice(words, 1 + (number + place) % 4)) for place in range(4)]
        letter = "ABCD"[number % 4]
        labelled = {"text": choices, "label": list("ABCD")}
        documents.append({"question_stem": stem, "choices": labelled, "answerKey": letter})
        problems.append(
            Problem(
                id=str(number), task="", difficulty=0, prompt=stem, solution="", answer=letter,
                choices=tuple(f" {choice}" for choice in choices),
            )
        )  # fmt: skip
    ours = score_choices(model, tokenizer, problems, headline="normalized")
    task = harness.make_task("openbookqa", "openbookqa/openbookqa.yaml", documents)
    requests = [
        Instance("loglikelihood", {}, (problem.prompt, choice), 0)
        for problem in problems
        for choice in problem.choices
    ]
    found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8).loglikelihood(
        requests, disable_tqdm=True
    )
    theirs = [found[start : start + 4] for start in range(0, len(found), 4)]
    # sums of at most 4 log-probabilities above -16, each of float32 logits and within 4 units of its last place, 2**-20
    np.testing.assert_allclose(
        ours["log_probs"],
        [[value for value, _ in of_one] for of_one in theirs],
        rtol=0,
        atol=4 * 4 * 2.0**-20,
    )
    metrics = [
        task.process_results(document, of_one) for document, of_one in zip(documents, theirs, strict=True)
    ]
    assert ours["num_correct_raw"] == [one["acc"] for one in metrics]
    assert ours["num_correct_normalized"] == [one["acc_norm"] for one in metrics]
    assert 0 < sum(ours["num_correct_raw"]) < len(problems)
    assert ours["num_correct_raw"] != ours["num_correct_normalized"]
