"""transformers.Trainer: the loss function from logits, and patched models; splits and ranks are in the table of ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.small_models import (
    SHAPING,
    assert_same_gradients,
    examples,
    expected_loss,
    gradients,
    num_targets,
    pad,
    small_model,
)
from tests.integrations.trainers import run_trainer

from rlprior.integrations.huggingface import patch_model, shaped_loss
from rlprior.objectives import CrossEntropy, Objective, RewardShaping, SampledReward

WAYS = ("shaped_loss", "patch_model")


def train(way: str, shaping: Objective, directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    model = small_model()
    if way == "shaped_loss":
        return run_trainer(model, directory, compute_loss_func=shaped_loss(shaping), **options)
    patch_model(model, shaping)
    return run_trainer(model, directory, **options)


@pytest.mark.parametrize("way", WAYS)
def test_zero_shaping_trains_as_the_trainer_does(way: str, tmp_path: Path):
    own = run_trainer(small_model(), tmp_path, batch_size=5, accumulation=3)
    assert_same_gradients(train(way, RewardShaping(), tmp_path, batch_size=5, accumulation=3), own)


def test_evaluation_of_a_patched_model_has_loss_and_logits(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    model = small_model().eval()
    expected = expected_loss(model, pad(examples()), SHAPING, num_targets(examples()))
    patch_model(model, SHAPING)
    seen = {}

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen["logits"] = prediction.predictions
        return {}

    trainer = Trainer(
        model=model,
        # one batch: a Trainer averages over batches, whatever their targets
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=12,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        eval_dataset=examples(),  # pyright: ignore[reportArgumentType]
        data_collator=pad,
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    logits = seen["logits"][0] if isinstance(seen["logits"], tuple) else seen["logits"]
    batch = pad(examples())
    batch.pop("labels")
    torch.testing.assert_close(torch.from_numpy(logits), model(**batch).logits)


def test_the_router_loss_is_not_lost():
    """A Trainer that has a loss function leaves the model's router loss to it."""
    model, batch = small_model("qwen3_moe"), pad(examples())
    count = num_targets(examples())
    model(**batch, num_items_in_batch=count).loss.backward()
    expected = gradients(model)
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        shaped_loss(CrossEntropy())(model(**batch), labels, count)
    coefficient = model.config.router_aux_loss_coef
    shaped_loss(CrossEntropy(), router_aux_loss_coef=coefficient)(model(**batch), labels, count).backward()
    assert_same_gradients(gradients(model), expected)


def test_the_function_alone():
    model, batch = small_model(), pad(examples())
    labels = batch.pop("labels")
    outputs, count = model(**batch), num_targets(examples())
    compute = shaped_loss(SHAPING, z_loss=1e-2)
    mean = compute(outputs, labels)
    torch.testing.assert_close(compute(outputs, labels, 2 * count) * 2, mean)
    assert torch.equal(compute(outputs.to_tuple(), labels), mean)
    assert mean > shaped_loss(SHAPING)(outputs, labels)  # the z-loss is positive
    with pytest.raises(ValueError, match="no labels"):
        compute(outputs, None)
    with pytest.raises(ValueError, match="shaping must be an instance"):
        shaped_loss("cross_entropy")  # pyright: ignore[reportArgumentType]


def test_draws_go_on_from_call_to_call():
    model, batch = small_model(), pad(examples())
    labels = batch.pop("labels")
    outputs = model(**batch)
    shaping = SampledReward(beta=-0.25, head_reward=0.5, tail_reward=-0.5, seed=3)
    first, second = shaped_loss(shaping), shaped_loss(shaping)
    losses = [float(first(outputs, labels).detach()) for _ in range(2)]
    assert losses == [float(second(outputs, labels).detach()) for _ in range(2)]
    assert losses[0] != losses[1]
