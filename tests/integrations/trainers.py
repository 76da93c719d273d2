"""One optimizer step of real trainers on the documents, and the gradient that arrived at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from tests.integrations.small_models import VOCABULARY, examples, gradients, pad
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

datasets.disable_progress_bars()


class GradientCatcher(TrainerCallback):
    """Keeps the gradient of the first step as the optimizer finds it."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any
    ) -> None:
        self.gradients = gradients(model)


def settings(directory: Path, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Arguments of every trainer here: one step on the CPU, gradients not clipped, nothing written."""
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def run_trainer(
    model: Any, directory: Path, *, batch_size: int = 12, accumulation: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Gradient of one step of `transformers.Trainer` on the documents, or on the dataset that `options` brings."""
    catcher = GradientCatcher()
    options.setdefault("train_dataset", examples())
    options.setdefault("data_collator", pad)
    Trainer(
        model=model,
        args=TrainingArguments(**settings(directory, batch_size, accumulation)),
        callbacks=[catcher],
        **options,
    ).train()
    return catcher.gradients


def sft_trainer(
    model: Any,
    directory: Path,
    *,
    batch_size: int = 12,
    accumulation: int = 1,
    arguments: Any = None,
    **options: Any,
) -> tuple[Any, GradientCatcher]:
    """A `trl.SFTTrainer` on the documents, tokenized and masked, or on the dataset that `options` brings."""
    from trl import SFTConfig, SFTTrainer

    catcher = GradientCatcher()
    options.setdefault("train_dataset", datasets.Dataset.from_list(examples()))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**settings(directory, batch_size, accumulation), **(arguments or {})}),
        processing_class=tokenizer(),
        callbacks=[catcher],
        **options,
    )
    return trainer, catcher


def tokenizer() -> PreTrainedTokenizerFast:
    """Word `tK` is token K."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {f"t{number}": number for number in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="t1"))
    raw.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="t0", eos_token="t2", unk_token="t1")
