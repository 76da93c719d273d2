"""Pools of answers: what is counted of them, and that an interrupted pool is filled to the same bytes."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_study import Killed, crash_on_call, study_config

from rlprior.config import RunError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import build_model, load_tokenizer
from rlprior.runs.files import read_jsonl
from rlprior.sampling import answers as answers_module
from rlprior.sampling.answers import answer_problems, frequent_answers_baseline
from rlprior.sampling.grades import grades_of
from rlprior.sampling.pools import questions_of
from rlprior.sampling.sampler import Decoding, Response
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.tasks.problem import Problem
from rlprior.tasks.verifier import open_verifier

CONFIG = study_config()
DECODING = Decoding(temperature=0.7, top_p=0.95, max_new_tokens=5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """An untrained model and the tokenizer of the small study."""
    directory = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare(CONFIG.data, directory)
    tokenizer = load_tokenizer(Corpus.open(directory).tokenizer_directory)
    return build_model(CONFIG.model, tokenizer, max_positions=64, seed=0), tokenizer


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_task(CONFIG.evaluation.tasks["sums"], split="test", num_problems=6, seed=0, data_dir=None)


def answer(
    policy: tuple[Any, Any], problems: list[Problem], path: Path, **changes: Any
) -> tuple[dict[str, list[Any]], list[int]]:
    progress: list[int] = []
    options: dict[str, Any] = {
        "name": "sums",
        "path": path,
        "model_identity": "m",
        "samples_per_problem": 4,
        "decoding": DECODING,
        "seed": 0,
        "progress": progress.append,
        **changes,
    }
    return answer_problems(*policy, problems, **options), progress


def scripted(tokenizer: Any, texts: list[list[str]]) -> Any:
    """A sampler that gives these responses; one that ends with `…` was cut."""

    def encode(text: str) -> Response:
        ids = tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"]
        stopped = not text.endswith("…")
        ids = ids + [tokenizer.eos_token_id] * stopped
        return Response(ids, [-0.5] * len(ids), "stop" if stopped else "length")

    return lambda *_, **__: [[encode(text) for text in group] for group in texts]


def test_counts_by_hand(policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [
        Problem(id=str(n), task="t", difficulty=1, prompt=f"Q: {n}\nA:", solution="", answer="5")
        for n in range(4)
    ]
    texts = [
        [" #### 5", " #### 5", " #### 7", "no"],  # a majority for the right answer
        [" #### 5", " #### 7", "no", "no"],  # a tie of right and wrong
        [" #### 7", " #### 7", " #### 5", " 1+…"],  # a majority for a wrong answer, one cut
        ["no", "no", " ##…", " #### 5\n…"],  # cut, but the answer was there
    ]
    monkeypatch.setattr(answers_module, "sample", scripted(policy[1], texts))
    columns, progress = answer(policy, problems, tmp_path / "pool.jsonl")
    encode = policy[1]
    lengths = [
        sum(
            len(encode(t.removesuffix("…"), add_special_tokens=False)["input_ids"]) + (t[-1] != "…")
            for t in group
        )
        for group in texts
    ]
    assert columns == {
        "problem_ids": ["0", "1", "2", "3"],
        "num_correct": [2, 1, 1, 1],
        "consensus": [1.0, 0.5, 0.0, 1.0],
        "consensus_tied": [False, True, False, False],
        "num_truncated": [0, 0, 1, 2],
        "num_unparsable": [1, 2, 0, 2],
        "num_timed_out": [0, 0, 0, 0],
        "num_failed": [0, 0, 0, 0],
        "num_disputed": [0, 0, 0, 0],
        "num_tokens": lengths,
        "num_cut": [0, 0, 0, 0],
    }
    assert sum(progress) == 16


def test_what_is_asked_is_the_prompt_at_the_start_of_a_document(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    original = answers_module.sample

    def record(model: Any, prompts: Any, **options: Any) -> Any:
        asked.append((prompts, options))
        return original(model, prompts, **options)

    monkeypatch.setattr(answers_module, "sample", record)
    answer(policy, problems, tmp_path / "pool.jsonl")
    ((prompts, options),) = asked
    tokenizer = policy[1]
    assert [tokenizer.decode(ids) for ids in prompts] == [f"<|bos|>{problem.prompt}" for problem in problems]
    assert options["decoding"] == DECODING
    assert [len(group) for group in options["generators"]] == [4] * len(problems)
    assert options["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("crashed_batch", [1, 2, 3])
def test_an_interrupted_pool_is_filled_to_the_same_bytes(
    policy: tuple[Any, Any],
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crashed_batch: int,
) -> None:
    monkeypatch.setattr(answers_module, "MAX_ROWS", 8)  # two problems a batch, three batches
    expected, _ = answer(policy, problems, tmp_path / "whole" / "pool.jsonl")
    path = tmp_path / "crashed" / "pool.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "sample", crash_on_call(crashed_batch, False, answers_module.sample))
        with pytest.raises(Killed):
            answer(policy, problems, path)
    with path.open("ab") as file:
        file.write(b'{"samples": [{"problem_id": "torn')
    found, _ = answer(policy, problems, path)
    assert found == expected
    for name in ("pool.jsonl", "pool.grades.jsonl"):
        assert (path.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_pool_is_not_sampled_again(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = answer(policy, problems, tmp_path / "pool.jsonl")
    monkeypatch.delattr(answers_module, "sample")
    monkeypatch.delattr(answers_module, "grade")
    assert answer(policy, problems, tmp_path / "pool.jsonl")[0] == first


def test_a_pool_of_other_weights_is_refused(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path
) -> None:
    answer(policy, problems, tmp_path / "pool.jsonl")
    with pytest.raises(RunError, match=r"holds samples of another run \(it differs in model_hash\)"):
        answer(policy, problems, tmp_path / "pool.jsonl", model_identity="other")


def test_samples_of_one_problem_differ_and_seeds_matter(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path
) -> None:
    pools: list[list[list[str]]] = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.jsonl"
        answer(policy, problems, path, seed=seed)
        samples = [one for line in read_jsonl(path)[1:] for one in line["samples"]]
        pools.append(
            [[one["text"] for one in samples if one["problem_id"] == problem.id] for problem in problems]
        )
    assert pools[0] != pools[1]
    # four draws of five tokens out of 300 that are all alike would be a stream that is used again
    assert all(len(set(texts)) > 1 for texts in pools[0])
    assert len({tuple(texts) for texts in pools[0]}) == len(problems)


def test_each_sample_has_a_random_stream_of_its_own(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same stream again would tie the luck of one sample to that of another."""
    seeds: list[int] = []
    original = answers_module.sample

    def record(*args: Any, generators: list[list[torch.Generator]], **options: Any) -> Any:
        seeds.extend(generator.initial_seed() for group in generators for generator in group)
        return original(*args, generators=generators, **options)

    monkeypatch.setattr(answers_module, "MAX_ROWS", 8)
    monkeypatch.setattr(answers_module, "sample", record)
    for name in ("sums", "other"):
        answer(policy, problems, tmp_path / f"{name}.jsonl", name=name)
    assert len(seeds) == len(set(seeds)) == 2 * 4 * len(problems)


def test_frequent_answers_by_hand() -> None:
    answers = ["3", "1", "3", "2", "3", "2"]
    assert frequent_answers_baseline(answers, 4) == [3 / 6, 5 / 6, 1.0, 1.0]
    assert frequent_answers_baseline(["1"], 1) == [1.0]


def test_grades_of_other_samples_are_not_reused(
    policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [Problem(id="0", task="t", difficulty=1, prompt="Q: 0\nA:", solution="", answer="5")]
    path = tmp_path / "pool.jsonl"
    for text, num_correct in ((" #### 5", 2), (" #### 7", 0)):
        monkeypatch.setattr(answers_module, "sample", scripted(policy[1], [[text, text]]))
        columns, _ = answer(policy, problems, path, samples_per_problem=2)
        assert columns["num_correct"] == [num_correct]
        path.unlink()


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_another_verifier_regrades_the_same_samples(
    policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [Problem(id="0", task="t", difficulty=1, prompt="Q: 0\nA:", solution="", answer="5")]
    texts = [[" #### 5", " #### 3+3", " #### 2+3", " #### 2 + 3"]]
    monkeypatch.setattr(answers_module, "sample", scripted(policy[1], texts))
    by_rules, _ = answer(policy, problems, tmp_path / "pool.jsonl")
    monkeypatch.setattr(answers_module, "sample", None)
    task = TaskConfig(verifier="math", verifier_timeout_seconds=20.0)
    with open_verifier(task, None) as verifier:
        by_math, _ = answer(policy, problems, tmp_path / "pool.jsonl", verifier=verifier)
    assert (by_rules["num_correct"], by_math["num_correct"]) == ([1], [3])
    # answers vote as they are written: two for 2+3, one for each other
    assert (by_rules["consensus"], by_math["consensus"]) == ([0.0], [1.0])


def test_more_samples_are_drawn_to_those_there_are(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, num_drawn = tmp_path / "pool.jsonl", []
    original = answers_module.sample

    def count(*args: Any, **options: Any) -> Any:
        num_drawn.append(sum(map(len, options["generators"])))
        return original(*args, **options)

    monkeypatch.setattr(answers_module, "sample", count)
    answer(policy, problems, path)
    few = path.read_bytes()
    columns, progress = answer(policy, problems, path, samples_per_problem=16)
    assert num_drawn == [4 * len(problems), 12 * len(problems)]
    assert path.read_bytes().startswith(few)
    assert progress == num_drawn  # what was there counts as done
    at_once, _ = answer(policy, problems, tmp_path / "at_once.jsonl", samples_per_problem=16)
    assert columns == at_once  # a sample is a function of its number, not of who was drawn beside it
    assert answer(policy, problems, path)[0]["num_tokens"] != columns["num_tokens"]  # four of sixteen
    assert len(read_jsonl(grades_of(path))[1:]) == 4 * len(problems)  # not the sixteen's, cut in fours
    again, _ = answer(policy, problems, path, samples_per_problem=16)
    assert again == columns


def test_long_prompts_keep_their_end_and_few_rows_share_the_memory(
    policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = policy
    batches: list[tuple[list[int], int]] = []
    asked: list[list[int]] = []
    original = answers_module.sample

    def record(model: Any, prompts: Any, **options: Any) -> Any:
        batches.append(([len(prompt) for prompt in prompts], len(options["generators"][0])))
        asked.extend(prompts)
        return original(model, prompts, **options)

    monkeypatch.setattr(answers_module, "sample", record)
    monkeypatch.setattr(model.config, "max_position_embeddings", 50)
    monkeypatch.setattr(answers_module, "_max_batch_tokens", lambda _: 3 * 50)
    problems = [
        Problem(id=name, task="t", difficulty=1, prompt=f"{name} " * 60 + "A:", solution="", answer="5")
        for name in "ab"
    ]
    columns, _ = answer(policy, problems, tmp_path / "pool.jsonl")
    room = 50 - DECODING.max_new_tokens
    assert batches == [([room], 3), ([room], 1)] * 2
    whole = encode_prompt(tokenizer, problems[0].prompt)
    assert asked[0] == [whole[0], *whole[1 - room :]]  # a document begins with its first token
    assert columns["num_cut"] == [1, 1]
    monkeypatch.setattr(model.config, "max_position_embeddings", DECODING.max_new_tokens + 1)
    with pytest.raises(RunError, match="leaves no room"):
        answer(policy, problems, tmp_path / "other.jsonl")


def test_a_stop_string_ends_a_response_and_is_no_part_of_it(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path
) -> None:
    free, stopped = tmp_path / "free.jsonl", tmp_path / "stopped.jsonl"
    decoding = Decoding(max_new_tokens=40)
    answer(policy, problems, free, decoding=decoding)
    answer(policy, problems, stopped, decoding=dataclasses.replace(decoding, stop=("e",)))
    long, short = (
        [one for line in read_jsonl(path)[1:] for one in line["samples"]] for path in (free, stopped)
    )
    assert any("e" in one["text"] for one in long)
    for whole, cut in zip(long, short, strict=True):
        assert cut["text"] == whole["text"].partition("e")[0]
        assert cut["token_ids"] == whole["token_ids"][: cut["num_tokens"]]
        assert (cut["finish_reason"] == "stop") == ("e" in whole["text"] or whole["finish_reason"] == "stop")
        if "e" in whole["text"]:
            tokenizer = policy[1]
            assert "e" in tokenizer.decode(cut["token_ids"])
            assert "e" not in tokenizer.decode(cut["token_ids"][:-1])


def test_what_was_asked_lies_beside_the_samples(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path
) -> None:
    answer(policy, problems, tmp_path / "pool.jsonl")
    asked = read_jsonl(questions_of(tmp_path / "pool.jsonl"))
    assert [(one["id"], one["prompt"], one["answer"]) for one in asked] == [
        (problem.id, problem.prompt, problem.answer) for problem in problems
    ]


def test_a_corrected_gold_answer_lies_beside_the_samples(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path
) -> None:
    path = tmp_path / "pool.jsonl"
    answer(policy, problems, path)
    samples = path.read_bytes()
    corrected = [dataclasses.replace(problem, answer="-1") for problem in problems[:2]]
    answer(policy, corrected, path)
    assert [one["answer"] for one in read_jsonl(questions_of(path))] == [
        "-1",
        "-1",
        *(problem.answer for problem in problems[2:]),
    ]
    assert path.read_bytes() == samples


def test_a_problem_that_was_asked_in_other_words_is_refused(
    policy: tuple[Any, Any], problems: list[Problem], tmp_path: Path
) -> None:
    path = tmp_path / "pool.jsonl"
    answer(policy, problems[:3], path)
    answer(policy, problems, path)  # more of them is no other run
    assert len(read_jsonl(questions_of(path))) == len(problems)
    before = path.read_bytes()
    other = [dataclasses.replace(problem, prompt=f"Hm. {problem.prompt}") for problem in problems]
    with pytest.raises(RunError, match="was asked with another prompt"):
        answer(policy, other, path)
    assert path.read_bytes() == before
