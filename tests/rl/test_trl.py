"""One update against the real trl.GRPOTrainer on the same rollouts: loss, advantages, masks and gradients."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.rl.test_update import CONFIG, spread_model
from tests.small_study import GradientRecorder
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from rlprior.data.tokenizer import train_tokenizer
from rlprior.rl.config import LengthPhase
from rlprior.rl.rollout import Group
from rlprior.rl.update import PolicyLogProbs, policy_update
from rlprior.sampling.sampler import Response
from rlprior.tasks.problem import Status, Verdict

# trl switches gradient checkpointing on under the name that transformers is about to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`torch_dtype` is deprecated"),
]

NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS = 4, 4, 12
EOS = 1


def random_groups() -> list[Group]:
    """Ragged responses, some of them cut; rewards that differ within a group, and one group whose rewards do not."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    groups = []
    for number in range(NUM_PROMPTS):
        responses = []
        for _ in range(NUM_SAMPLES):
            length = draw(1, MAX_NEW_TOKENS + 1, 1)[0]
            is_cut = length == MAX_NEW_TOKENS or draw(0, 3, 1)[0] == 0
            ids = draw(3, 50, length) if is_cut else [*draw(3, 50, length - 1), EOS]
            near_the_policy = -(2.5 + 3 * torch.rand(length, generator=generator))
            responses.append(Response(ids, near_the_policy.tolist(), "length" if is_cut else "stop"))
        right = [True] * NUM_SAMPLES if number == 2 else [place <= number for place in range(NUM_SAMPLES)]
        verdicts = [Verdict(Status.CORRECT if one else Status.WRONG, "1") for one in right]
        groups.append(Group(draw(3, 50, 3 + number), responses, verdicts))
    return groups


class KeepGradients(TrainerCallback):
    """Notes the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = [parameter.grad.clone() for parameter in kwargs["model"].parameters()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(["some text to learn pieces from"] * 3), 280)


def run_trl(
    model: Any,
    tokenizer: Any,
    groups: list[Group],
    directory: Path,
    *,
    old_log_probs: str = "trainer",
    **settings: Any,
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one step of TRL's own training loop, which asks for rollouts and rewards and is given these."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if old_log_probs == "sampler":
                output["old_per_token_logps"] = output["sampling_per_token_logps"]
            return output

    rows = [(group, place) for group in groups for place in range(NUM_SAMPLES)]

    def give_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        # TRL shuffles the prompts
        asked = [groups[int(prompt)] for prompt in prompts]
        order = [(group, number % NUM_SAMPLES) for number, group in enumerate(asked)]
        return {
            "prompt_ids": [group.prompt_ids for group, _ in order],
            "completion_ids": [group.responses[place].token_ids for group, place in order],
            "logprobs": [group.responses[place].log_probs for group, place in order],
            "place": [place for _, place in order],
        }

    def reward(prompts: list[str], completions: Any, place: list[int], **_: Any) -> list[float | None]:
        return [groups[int(prompt)].rewards[at] for prompt, at in zip(prompts, place, strict=True)]

    args = GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        num_generations=NUM_SAMPLES,
        max_completion_length=MAX_NEW_TOKENS,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        logging_steps=1,
        **{"per_device_train_batch_size": len(rows), **settings},
    )
    keep = KeepGradients()
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(n) for n in range(len(groups))]}),
        processing_class=tokenizer,
        rollout_func=give_rollouts,
        callbacks=[keep],
    )
    loss = trainer.train().training_loss
    return loss, keep.gradients


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({}, {"loss_type": "dapo"}),
    "grpo": ({"loss_aggregation": "grpo"}, {"loss_type": "grpo"}),
    "dr_grpo": (
        {"loss_aggregation": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "dapo at another temperature": ({"temperature": 0.7}, {"loss_type": "dapo", "temperature": 0.7}),
    "dapo without cut responses": (
        {"mask_truncated": True},
        {"loss_type": "dapo", "mask_truncated_completions": True},
    ),
    "grpo without cut responses": (
        {"mask_truncated": True, "loss_aggregation": "grpo"},
        {"loss_type": "grpo", "mask_truncated_completions": True},
    ),
    # ratios from 0 to 10, so that both bounds clip
    **{
        f"{name} from the sampler's log-probabilities": (
            {"loss_aggregation": name, "old_log_probs": "sampler"},
            {"loss_type": name, "old_log_probs": "sampler"},
        )
        for name in ("dapo", "grpo", "dr_grpo")
    },
    "an entropy bonus": ({"entropy_bonus": 0.1}, {"loss_type": "dapo", "entropy_coef": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_trls(case: str, tokenizer: Any, tmp_path: Path) -> None:
    ours, theirs = CASES[case]
    groups = random_groups()
    model = spread_model()
    expected_loss, expected = run_trl(
        copy.deepcopy(model), tokenizer, groups, tmp_path, **{"temperature": 1.0, **theirs}
    )
    config = dataclasses.replace(
        CONFIG,
        **{
            "temperature": 1.0,
            "samples_per_prompt": NUM_SAMPLES,
            "length_schedule": (LengthPhase(max_new_tokens=MAX_NEW_TOKENS),),
            **ours,
        },
    )
    recorder: Any = GradientRecorder(model)
    measured = policy_update(PolicyLogProbs(model), recorder, groups, config, rate=0.0, step=1)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 1e-3, "a gradient of nothing proves nothing"
    assert (measured["clip_share"] > 0.05) == (config.old_log_probs == "sampler")
    assert measured["loss"] == pytest.approx(expected_loss, abs=1e-5)
    assert len(expected) == len(recorder.gradients)
    for gradient, other in zip(recorder.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5 * largest)
