"""Rollouts: prompts in, groups of graded responses out, with dynamic sampling."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprior.config import RunError
from rlprior.data.tokenizer import encode_prompt
from rlprior.rl.config import RLConfig
from rlprior.rl.grpo import has_signal
from rlprior.sampling.engines import RolloutEngine
from rlprior.sampling.sampler import Decoding, Response
from rlprior.seeding import shuffled_places, torch_generator
from rlprior.tasks.problem import UNGRADED, Problem, Status, Verdict
from rlprior.tasks.verifier import RULES, Verifier
from rlprior.world import ALONE, World

SHARES = (Status.CORRECT, Status.UNPARSABLE, Status.TIMED_OUT, Status.FAILED)
"""Statuses whose share of the samples is logged."""


@dataclass(frozen=True)
class Group:
    """One prompt, its responses, and their verdicts."""

    prompt_ids: list[int]
    responses: list[Response]
    verdicts: list[Verdict]

    @property
    def rewards(self) -> list[float]:
        """Reward of each response; without a verdict the least of the group's, and not above 0: not being graded must never pay."""
        graded = [verdict.reward for verdict in self.verdicts if verdict.status not in UNGRADED]
        least = min([*graded, 0.0])
        return [least if verdict.status in UNGRADED else verdict.reward for verdict in self.verdicts]


@dataclass(frozen=True)
class Rollout:
    """The groups of one step: all that were drawn, and those that are trained on."""

    drawn: list[Group]
    kept: list[Group]
    num_refills: int
    cursor: int


class PromptStream:
    """Training problems in an order shuffled anew each pass: the problem at a cursor is a function of (seed, cursor)."""

    def __init__(self, problems: Sequence[Problem], tokenizer: Any, seed: int) -> None:
        self.problems = problems
        self.prompt_ids = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
        self.seed = seed

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_ids))

    def take(self, cursor: int, count: int) -> list[int]:
        """Indices of the problems at cursors `cursor` to `cursor + count - 1`."""
        places = range(cursor, cursor + count)
        return shuffled_places(len(self.problems), places, self.seed, "prompts")


def collect_rollout(
    engine: RolloutEngine,
    tokenizer: Any,
    prompts: PromptStream,
    config: RLConfig,
    *,
    step: int,
    cursor: int,
    seed: int,
    verifier: Verifier = RULES,
    world: World = ALONE,
) -> Rollout:
    """Sample groups for one update; with 'refill', until `prompts_per_step` of them carry a gradient or the cap is reached.

    Every process of the world draws its share of the groups, and all return all of them.
    """
    drawn: list[Group] = []
    kept: list[Group] = []
    refill = 0
    while True:
        missing = config.prompts_per_step - len(kept)
        indices = prompts.take(cursor, missing)
        cursor += missing
        generators = [
            [
                torch_generator(seed, "rollout", step, refill, place, sample)
                for sample in range(config.samples_per_prompt)
            ]
            for place in range(missing)
        ]
        own = slice(world.rank, None, world.size)
        draw = partial(sample_groups, engine, tokenizer, prompts, indices[own], config)
        shares = world.on_each(partial(draw, step=step, generators=generators[own], verifier=verifier))
        groups = [shares[place % world.size][place // world.size] for place in range(missing)]
        if all(verdict.status in UNGRADED for group in groups for verdict in group.verdicts):
            raise RunError(
                f"step {step}: no response could be graded: each took more than rl.task.verifier_timeout_seconds = "
                f"{config.task.verifier_timeout_seconds:g} or more memory than a grading process may have"
            )
        drawn += groups
        if config.dynamic_sampling == "off":
            kept += groups
        else:
            signal = has_signal(rewards_of(groups))
            kept += [group for group, keep in zip(groups, signal.tolist(), strict=True) if keep]
        if (
            config.dynamic_sampling != "refill"
            or len(kept) == config.prompts_per_step
            or refill == config.max_refills
        ):
            return Rollout(drawn, kept, refill, cursor)
        refill += 1


def sample_groups(
    engine: RolloutEngine,
    tokenizer: Any,
    prompts: PromptStream,
    indices: Sequence[int],
    config: RLConfig,
    *,
    step: int,
    generators: Sequence[Sequence[torch.Generator]],
    verifier: Verifier,
) -> list[Group]:
    """Draw and grade a response of each problem with each of its generators."""
    if not indices:  # with fewer prompts than processes
        return []
    batches = engine.sample(
        [prompts.prompt_ids[index] for index in indices],
        decoding=Decoding(temperature=config.temperature, max_new_tokens=config.max_new_tokens(step)),
        eos_token_id=tokenizer.eos_token_id,
        generators=generators,
    )
    texts = tokenizer.batch_decode(
        [response.token_ids for responses in batches for response in responses], skip_special_tokens=True
    )
    asked = [
        (prompts.problems[i], one) for i, responses in zip(indices, batches, strict=True) for one in responses
    ]
    verdicts = iter(
        verifier.grade(
            [
                (problem, text, one.finish_reason == "length")
                for (problem, one), text in zip(asked, texts, strict=True)
            ]
        )
    )
    return [
        Group(prompts.prompt_ids[index], responses, list(itertools.islice(verdicts, len(responses))))
        for index, responses in zip(indices, batches, strict=True)
    ]


def rewards_of(groups: Sequence[Group]) -> Tensor:
    """Rewards [P, G] in float32."""
    return torch.tensor([group.rewards for group in groups], dtype=torch.float32)


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What is logged of a rollout before any update; shares are of all samples drawn. No `reward_mean_kept` where no group is kept."""
    responses = [response for group in rollout.drawn for response in group.responses]
    verdicts = [verdict for group in rollout.drawn for verdict in group.verdicts]
    statuses = Counter(verdict.status for verdict in verdicts)
    lengths = np.array([len(response.token_ids) for response in responses])
    rewards, kept = rewards_of(rollout.drawn), rewards_of(rollout.kept)
    return {
        "reward_mean": float(rewards.mean()),
        **({"reward_mean_kept": float(kept.mean())} if rollout.kept else {}),
        "dead_group_share": 1 - float(has_signal(rewards).float().mean()),
        "num_groups_kept": len(rollout.kept),
        "num_groups_drawn": len(rollout.drawn),
        "num_refills": rollout.num_refills,
        "response_tokens_mean": float(lengths.mean()),
        **{
            f"response_tokens_p{percent}": float(np.quantile(lengths, percent / 100))
            for percent in (10, 50, 90)
        },
        "response_tokens_max": float(lengths.max()),
        "truncated_share": float(np.mean([response.finish_reason == "length" for response in responses])),
        **{f"{status}_share": statuses[status] / len(verdicts) for status in SHARES},
    }
