"""Dynamic sampling against a scripted sampler: which groups are drawn, kept, and where the prompts come from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from rlprior.config import RunError
from rlprior.rl.config import LengthPhase, RLConfig
from rlprior.rl.rollout import Group, PromptStream, Rollout, collect_rollout, rollout_metrics
from rlprior.sampling.sampler import Response
from rlprior.tasks.config import TaskConfig
from rlprior.tasks.problem import Problem, Status, Verdict

NUM_PROBLEMS = 7
START = 5
CONFIG = RLConfig(
    task=TaskConfig(),
    prompts_per_step=3,
    samples_per_prompt=4,
    max_refills=4,
    length_schedule=(LengthPhase(until_step=2, max_new_tokens=9), LengthPhase(max_new_tokens=11)),
)
PROBLEMS = [
    Problem(id=str(i), task="t", difficulty=1, prompt=f"Q: {i}\nA:", solution=f" #### {i}", answer=str(i))
    for i in range(NUM_PROBLEMS)
]


class Characters:
    """A tokenizer whose tokens are the code points; 0 begins a document and 1 ends it."""

    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def batch_decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(token) for token in row if token > 1) for row in rows]


class ScriptedEngine:
    """Answers each prompt of call n right in as many samples as `script[n]` says, and remembers what it was asked."""

    def __init__(self, script: Sequence[Sequence[int]]) -> None:
        self.script = script
        self.calls: list[dict[str, Any]] = []

    def load(self, model: Any) -> None: ...

    def sample(self, prompts: Sequence[Sequence[int]], **rest: Any) -> list[list[Response]]:
        counts = self.script[len(self.calls)]
        asked = [
            int("".join(chr(token) for token in prompt[1:] if chr(token).isdigit())) for prompt in prompts
        ]
        assert all(prompt[0] == Characters.bos_token_id for prompt in prompts)
        seeds = [generator.initial_seed() for group in rest["generators"] for generator in group]
        samples_per_prompt = len(rest["generators"][0])
        assert len(seeds) == len(set(seeds)) == len(prompts) * samples_per_prompt
        self.calls.append({"asked": asked, "seeds": seeds, **rest})
        return [
            [respond(f" #### {number if i < correct else 'no'}") for i in range(samples_per_prompt)]
            for number, correct in zip(asked, counts, strict=True)
        ]


def respond(text: str, *, finished: bool = True) -> Response:
    ids = [ord(character) for character in text] + [1] * finished
    return Response(ids, [-1.0] * len(ids), "stop" if finished else "length")


def roll_out(
    script: Sequence[Sequence[int]], *, step: int = 1, seed: int = 0, **changes: Any
) -> tuple[Rollout, ScriptedEngine]:
    engine: Any = ScriptedEngine(script)
    prompts = PromptStream(PROBLEMS, Characters(), seed)
    config = dataclasses.replace(CONFIG, **changes)
    return collect_rollout(engine, Characters(), prompts, config, step=step, cursor=START, seed=seed), engine


def num_correct(groups: Sequence[Any]) -> list[int]:
    return [int(sum(group.rewards)) for group in groups]


def expected_order(start: int, count: int) -> list[int]:
    return PromptStream(PROBLEMS, Characters(), 0).take(start, count)


def test_refill_replaces_groups_of_equal_rewards_until_the_step_is_full() -> None:
    rollout, engine = roll_out([[0, 1, 4], [3, 0], [2]])
    assert num_correct(rollout.kept) == [1, 3, 2]
    assert num_correct(rollout.drawn) == [0, 1, 4, 3, 0, 2]
    assert rollout.num_refills == 2
    assert rollout.cursor == START + 6
    assert list(itertools.chain(*(call["asked"] for call in engine.calls))) == expected_order(START, 6)


def test_no_refill_where_none_is_needed() -> None:
    rollout, _ = roll_out([[1, 2, 3]])
    assert (num_correct(rollout.kept), rollout.num_refills, rollout.cursor) == ([1, 2, 3], 0, START + 3)


@pytest.mark.parametrize("max_refills", [0, 1, 2])
def test_refills_are_capped_and_the_step_makes_do_with_fewer(max_refills: int) -> None:
    script = [[0, 1, 4], [0, 0], [0, 4], [1, 1]]
    rollout, engine = roll_out(script, max_refills=max_refills)
    assert num_correct(rollout.kept) == [1]
    assert rollout.num_refills == max_refills
    assert len(engine.calls) == 1 + max_refills
    assert rollout.cursor == START + 3 + 2 * max_refills


def test_nothing_is_kept_where_no_group_has_a_signal() -> None:
    rollout, _ = roll_out([[0, 4, 0], [0, 0, 4]], max_refills=1)
    assert rollout.kept == []
    assert rollout.cursor == START + 6
    assert "reward_mean_kept" not in rollout_metrics(rollout)


def test_drop_trains_on_fewer_without_drawing_again() -> None:
    rollout, engine = roll_out([[0, 1, 4]], dynamic_sampling="drop")
    assert (num_correct(rollout.kept), num_correct(rollout.drawn)) == ([1], [0, 1, 4])
    assert (rollout.num_refills, rollout.cursor, len(engine.calls)) == (0, START + 3, 1)


def test_off_keeps_groups_of_equal_rewards() -> None:
    rollout, engine = roll_out([[0, 1, 4]], dynamic_sampling="off")
    assert num_correct(rollout.kept) == [0, 1, 4]
    assert (rollout.num_refills, rollout.cursor, len(engine.calls)) == (0, START + 3, 1)


def test_each_draw_has_a_random_stream_of_its_own() -> None:
    seeds = set()
    for step, seed in ((1, 0), (2, 0), (1, 1)):
        _, engine = roll_out([[0, 0, 0], [0, 0, 0]], step=step, seed=seed, max_refills=1)
        seeds |= {seed for call in engine.calls for seed in call["seeds"]}
    assert len(seeds) == 72
    _, again = roll_out([[0, 0, 0], [0, 0, 0]], max_refills=1)
    assert {seed for call in again.calls for seed in call["seeds"]} < seeds


@pytest.mark.parametrize(("step", "longest"), [(1, 9), (2, 9), (3, 11), (100, 11)])
def test_the_length_schedule_applies(step: int, longest: int) -> None:
    _, engine = roll_out([[1, 1, 1]], step=step, temperature=0.6)
    decoding = engine.calls[0]["decoding"]
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p) == (longest, 0.6, 1.0)
    assert engine.calls[0]["eos_token_id"] == Characters.eos_token_id


def test_prompts_are_a_function_of_the_cursor_and_shuffled_anew_each_epoch() -> None:
    stream = PromptStream(PROBLEMS, Characters(), seed=0)
    first, second = stream.take(0, NUM_PROBLEMS), stream.take(NUM_PROBLEMS, NUM_PROBLEMS)
    assert sorted(first) == sorted(second) == list(range(NUM_PROBLEMS))
    assert first != second
    whole = stream.take(0, 3 * NUM_PROBLEMS)
    for start, count in ((0, 2), (5, 4), (6, 10), (14, 7)):
        assert PromptStream(PROBLEMS, Characters(), seed=0).take(start, count) == whole[start : start + count]
    assert PromptStream(PROBLEMS, Characters(), seed=1).take(0, 3 * NUM_PROBLEMS) != whole


def test_not_being_graded_never_pays() -> None:
    def rewards(*given: float | None) -> list[float]:
        verdicts = [
            Verdict(Status.TIMED_OUT, None, 0.0) if one is None else Verdict(Status.WRONG, None, one)
            for one in given
        ]
        return Group([3], [respond("?")] * len(given), verdicts).rewards

    assert rewards(-1.0, None, -0.5) == [-1.0, -1.0, -0.5]
    assert rewards(1.0, None, 0.5) == [1.0, 0.0, 0.5]
    assert rewards(None, None) == [0.0, 0.0]


def test_a_rollout_that_nobody_could_grade_is_an_error() -> None:
    """It would train nothing, step after step, and call it success."""
    verifier: Any = SimpleNamespace(
        grade=lambda responses: [Verdict(Status.TIMED_OUT, None, 0.0) for _ in responses]
    )
    engine: Any = ScriptedEngine([[1, 2, 3]])
    with pytest.raises(
        RunError, match=r"step 1: no response could be graded: .*verifier_timeout_seconds = 1 "
    ):
        collect_rollout(
            engine,
            Characters(),
            PromptStream(PROBLEMS, Characters(), 0),
            CONFIG,
            step=1,
            cursor=0,
            seed=0,
            verifier=verifier,
        )


def test_metrics_of_a_rollout() -> None:
    """By hand: two groups of four, one of them all wrong, with a truncated and an unparsable response."""
    responses = [
        [respond(" #### 3"), respond("?"), respond(" #### 9"), respond(" ##", finished=False)],
        [respond(" #### 8")] * 4,
    ]
    engine: Any = ScriptedEngine([])
    engine.sample = lambda *_, **__: responses
    config = dataclasses.replace(CONFIG, prompts_per_step=2, dynamic_sampling="drop")
    stream = PromptStream([PROBLEMS[3]], Characters(), 0)
    rollout = collect_rollout(engine, Characters(), stream, config, step=1, cursor=0, seed=0)
    statuses = [verdict.status for verdict in rollout.drawn[0].verdicts]
    assert statuses == [Status.CORRECT, Status.UNPARSABLE, Status.WRONG, Status.TRUNCATED]
    lengths = [8, 2, 8, 3, 8, 8, 8, 8]
    expected = {
        "reward_mean": 1 / 8,
        "reward_mean_kept": 1 / 4,
        "dead_group_share": 1 / 2,
        "num_groups_kept": 1,
        "num_groups_drawn": 2,
        "num_refills": 0,
        "response_tokens_mean": sum(lengths) / 8,
        "response_tokens_p10": 2.7,  # 0.7 of the way from the shortest to the next
        "response_tokens_p50": 8,
        "response_tokens_p90": 8,
        "response_tokens_max": 8,
        "truncated_share": 1 / 8,
        "correct_share": 1 / 8,
        "unparsable_share": 1 / 8,
        "timed_out_share": 0,
        "failed_share": 0,
    }
    assert rollout_metrics(rollout) == pytest.approx(expected)
