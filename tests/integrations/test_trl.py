"""The real trl.SFTTrainer: its batches and masks, its normalisation, what it logs, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.integrations.small_models import (
    SHAPING,
    assert_same_gradients,
    examples,
    expected_gradients,
    expected_loss,
    gradients,
    num_targets,
    pad,
    small_model,
)
from tests.integrations.trainers import sft_trainer

from rlprior.integrations.huggingface import patch_model, shaped_loss
from rlprior.integrations.trl import patch_trainer
from rlprior.objectives import RewardShaping

# trl switches gradient checkpointing on under the name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")


def cut(rows: list[dict[str, list[int]]], length: int, *, keeps_rest: bool) -> list[dict[str, list[int]]]:
    """The first tokens of each row, or all of them in rows of their own."""
    return [
        {name: numbers[start : start + length] for name, numbers in row.items()}
        for row in rows
        for start in range(0, len(row["input_ids"]) if keeps_rest else 1, length)
    ]


def stream() -> dict[str, list[int]]:
    """All documents in one row."""
    return {name: [number for row in examples() for number in row[name]] for name in ("input_ids", "labels")}


# what trl's strategies make of documents longer than the rows: the overflow dropped, kept apart, or no documents at all
PACKED = {
    "bfd": cut(examples(), 9, keeps_rest=False),
    "bfd_split": cut(examples(), 9, keeps_rest=True),
    "wrapped": cut([stream()], 9, keeps_rest=True),
}


# trl warns that only flash attention is known to keep documents apart; the models' own masks do, as the gradient shows
@pytest.mark.filterwarnings("ignore:.*[Ff]lash")
@pytest.mark.parametrize(("batch_size", "accumulation"), [(10, 1), (4, 3)])
@pytest.mark.parametrize("strategy", PACKED)
def test_packed_rows_have_the_gradient_of_separate_rows(
    strategy: str, batch_size: int, accumulation: int, tmp_path: Path
):
    trainer, catcher = sft_trainer(
        small_model(),
        tmp_path,
        batch_size=batch_size,
        accumulation=accumulation,
        arguments={"packing": True, "packing_strategy": strategy, "max_length": 9},
    )
    assert len(trainer.train_dataset) in (9, 10)  # one step takes them all
    patch_trainer(trainer, SHAPING)
    trainer.train()
    model, rows = small_model(), PACKED[strategy]
    expected_loss(model, pad(rows), SHAPING, num_targets(rows)).backward()
    assert_same_gradients(catcher.gradients, gradients(model))


@pytest.mark.filterwarnings("ignore:.*[Ff]lash")
def test_padding_free_batches_have_the_same_gradient(tmp_path: Path):
    trainer, catcher = sft_trainer(
        small_model(),
        tmp_path,
        batch_size=5,
        accumulation=3,
        arguments={"padding_free": True, "max_length": None},
    )
    patch_trainer(trainer, SHAPING)
    trainer.train()
    assert_same_gradients(catcher.gradients, expected_gradients())


def test_models_that_take_no_count_have_the_gradient_of_one_batch(tmp_path: Path):
    """Such as most that see images; the trainer on its own averages the means of unequal micro-batches."""
    model = small_model()
    model.accepts_loss_kwargs = False
    trainer, catcher = sft_trainer(model, tmp_path, batch_size=5, accumulation=3)
    patch_trainer(trainer, SHAPING)
    trainer.train()
    assert_same_gradients(catcher.gradients, expected_gradients())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_zero_shaping_trains_and_logs_as_the_trainer_does(family: str, tmp_path: Path):
    """Router losses included."""
    found = []
    for is_patched in (False, True):
        trainer, catcher = sft_trainer(
            small_model(family), tmp_path, batch_size=2, accumulation=2, arguments={"logging_steps": 1}
        )
        if is_patched:
            patch_trainer(trainer, RewardShaping())
        trainer.train()
        found.append((catcher.gradients, trainer.state.log_history[0]))
    (own_gradients, own_log), (patched_gradients, patched_log) = found
    assert_same_gradients(patched_gradients, own_gradients)
    assert patched_log.keys() == own_log.keys()
    assert {"loss", "entropy", "mean_token_accuracy", "num_tokens"} <= own_log.keys()
    assert patched_log == pytest.approx(
        own_log, rel=1e-4
    )  # float32 sums in another order, through logging's rounding


def test_only_completions_are_trained_on(tmp_path: Path):
    rows = [
        {"prompt": "t5 t9 t11", "completion": " t12 t13"},
        {"prompt": "t6", "completion": " t7 t8 t20 t21"},
    ]
    model = small_model()
    trainer, catcher = sft_trainer(model, tmp_path, train_dataset=datasets.Dataset.from_list(rows))
    patch_trainer(trainer, SHAPING)
    batch = next(iter(trainer.get_train_dataloader()))
    kept = batch["labels"] != -100
    assert 0 < kept.sum() < batch["attention_mask"].sum()
    trainer.train()
    expected_model = small_model()
    expected_loss(expected_model, dict(batch), SHAPING, int(kept[:, 1:].sum())).backward()
    assert_same_gradients(catcher.gradients, gradients(expected_model))


def test_evaluation(tmp_path: Path):
    model = small_model()
    expected = expected_loss(model, pad(examples()), SHAPING, num_targets(examples()))
    trainer, _ = sft_trainer(
        model,
        tmp_path,
        eval_dataset=datasets.Dataset.from_list(examples()),
        # one batch: a Trainer averages over batches, whatever their targets
        arguments={"per_device_eval_batch_size": 12},
    )
    patch_trainer(trainer, SHAPING)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    prompt = torch.tensor([[5, 6, 7]])
    text = small_model().eval().generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), text)


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
def test_the_loss_from_logits(tmp_path: Path):
    """The deprecated way; it still trains what it says."""
    trainer, catcher = sft_trainer(
        small_model(), tmp_path, batch_size=5, accumulation=3, compute_loss_func=shaped_loss(SHAPING)
    )
    trainer.train()
    assert_same_gradients(catcher.gradients, expected_gradients())


def test_trainers_that_it_cannot_serve(tmp_path: Path):
    trainer: Any
    trainer, _ = sft_trainer(small_model(), tmp_path, arguments={"loss_type": "dft"})
    with pytest.raises(ValueError, match="leave loss_type at 'nll'"):
        patch_trainer(trainer, SHAPING)
    trainer, _ = sft_trainer(small_model(), tmp_path)
    patch_trainer(trainer, SHAPING)
    with pytest.raises(ValueError, match="not patched before"):
        patch_trainer(trainer, SHAPING)
    model = small_model()
    patch_model(model, SHAPING)  # before the trainer was made: its own forward pass goes around the patch
    trainer, _ = sft_trainer(model, tmp_path)
    with pytest.raises(RuntimeError, match="was replaced since patch_model"):
        patch_trainer(trainer, SHAPING)
