"""Supervised fine-tuning: TRL's SFTTrainer on prompts and completions, under any next-token objective of this project."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlprior.models.causal_lm import load_tokenizer
from rlprior.posttraining.config import SFTConfig
from rlprior.posttraining.examples import encode_examples, load_completions
from rlprior.runs.folder import Run
from rlprior.tasks.config import data_folder

CODE = (
    "rlprior.posttraining",
    "rlprior.data.tokenizer",
    "rlprior.tasks",
    "rlprior.sampling",
    "rlprior.statistics",
    "rlprior.objectives",
    "rlprior.integrations",
    "rlprior.models",
    "rlprior.training.checkpoint",
    "rlprior.training.schedule",
    "rlprior.training.update",
    "rlprior.seeding",
)


@dataclass(frozen=True, kw_only=True)
class SFTRunConfig:
    """A run of supervised fine-tuning.

    Args:
        sft: what it does.
        init_from: Hugging Face folder of the model to start from.
        seed: of problems and their order.
        data_dir: folder that relative paths of the task or the file start from.
    """

    sft: SFTConfig
    init_from: str
    seed: int = 0
    data_dir: str | None = None


def run(config: SFTRunConfig, run: Run) -> Path:
    """Train, from the newest good checkpoint if there is one. Returns the folder of the last checkpoint.

    Raises:
        RunStopped: SIGTERM came; the step in progress has been finished and saved.
    """
    if run.result is not None:
        return run.directory / run.result["checkpoint"]
    from rlprior.posttraining.trainer import train

    sft, start = config.sft, Path(config.init_from)
    data_dir = data_folder(config.data_dir)
    completions = load_completions(sft, seed=config.seed, data_dir=data_dir)
    examples, num_too_long = encode_examples(load_tokenizer(start), completions, max_tokens=sft.max_tokens)
    return train(
        partial(make_trainer, sft),
        examples,
        sft,
        run,
        init_from=start,
        max_positions=max(len(example["input_ids"]) for example in examples),
        seed=config.seed,
        result={"num_examples": len(examples), "num_too_long": num_too_long},
    )


def make_trainer(config: SFTConfig, model: Any, options: dict[str, Any], **arguments: Any) -> Any:
    """An SFTTrainer with the objective in place of its loss."""
    from rlprior.integrations.trl import patch_trainer
    from rlprior.posttraining.trainer import SFTTrainer, trl

    trainer = SFTTrainer(model=model, args=trl.SFTConfig(**options, loss_type="nll"), **arguments)
    patch_trainer(trainer, config.objective)
    return trainer
