"""The shaped loss in trl.SFTTrainer, on completions alone.

pip install 'rlprior[integrations]'
python examples/loss/trl_sft.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from rlprior.integrations.trl import patch_trainer
from rlprior.objectives import RewardShaping

ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(6) for b in range(6)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "+", "=", *map(str, range(12))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=2,
            max_steps=10,
            learning_rate=1e-2,
            logging_steps=5,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=tiny_model(tokenizer),
            args=arguments,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(ROWS),
        )
        patch_trainer(trainer, RewardShaping(tail_reward=-0.1, top_k=5))
        trainer.train()
        for entry in trainer.state.log_history[:-1]:
            print(
                f"step {entry['step']}: entropy {entry['entropy']:.3f} nats, accuracy {entry['mean_token_accuracy']:.2f}"
            )


if __name__ == "__main__":
    main()
