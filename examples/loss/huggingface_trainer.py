"""The shaped loss in transformers.Trainer: without logits, and from logits.

pip install 'rlprior[integrations]'
python examples/loss/huggingface_trainer.py
"""

import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from rlprior.integrations.huggingface import patch_model, shaped_loss
from rlprior.objectives import RewardShaping

SHAPING = RewardShaping(beta=-0.25)
ROWS = [
    {"input_ids": [(start + i) % 64 for i in range(16)]} for start in range(32)
]  # each row counts upwards


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}  # not shifted; -100 where nothing is to be learnt


def tiny_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, directory: str, **options) -> float:
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=10,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, data_collator=collate, **options)
    return trainer.train().training_loss


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model()
        patch_model(model, SHAPING)
        print(f"patched model: mean loss {train(model, directory):.3f}")

        model = tiny_model()
        loss = train(model, directory, compute_loss_func=shaped_loss(SHAPING))
        print(f"from logits:   mean loss {loss:.3f}")


if __name__ == "__main__":
    main()
