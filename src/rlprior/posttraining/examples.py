"""Prompts and completions to fine-tune on, as the tokens that the sampler sees."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.data.tokenizer import encode_prompt
from rlprior.posttraining.config import SFTConfig
from rlprior.tasks.config import load_task, resolve_path
from rlprior.tasks.files import check_text, read_json_lines

IGNORED = -100
"""Label of a token that is not trained on."""


def load_completions(config: SFTConfig, *, seed: int, data_dir: Path | None) -> list[tuple[str, str]]:
    """Prompt and completion of each example: a task's worked solutions, or the lines of a file.

    Raises:
        UsageError: a file that is missing or has other fields.
        RunError: a file that cannot be used, with its line.
    """
    if config.task is None:
        return read_completions(resolve_path(config.path or "", data_dir))
    problems = load_task(
        config.task, split="train", num_problems=config.num_problems, seed=seed, data_dir=data_dir
    )
    return [(problem.prompt, problem.solution) for problem in problems]


def read_completions(path: Path) -> list[tuple[str, str]]:
    """Prompt and completion of each line of a JSON Lines file, exactly as they stand there; other fields are left alone.

    Raises:
        UsageError: no such file, or a record without `prompt` and `completion`.
        RunError: an empty file, a line that is not JSON, text that is none, or an empty completion, with file and line.
    """
    pairs: list[tuple[str, str]] = []
    for number, record in read_json_lines(path):
        where = f"{path}:{number}"
        for name in ("prompt", "completion"):
            if name not in record:
                raise UsageError(
                    f"{where}: needs `prompt` and `completion`; it has {', '.join(record) or 'nothing'}"
                )
            if not isinstance(record[name], str):
                raise RunError(f"{where}: `{name}` must be text, not {type(record[name]).__name__}")
        if not record["completion"]:
            raise RunError(f"{where}: the completion is empty; there is nothing to learn from it")
        pairs.append((check_text(record["prompt"], where), check_text(record["completion"], where)))
    return pairs


def encode_example(tokenizer: Any, prompt: str, completion: str) -> dict[str, list[int]]:
    """Token ids of prompt and completion, and labels that leave the prompt out.

    Each is encoded by itself, because the sampler continues the prompt's tokens whatever comes; the end-of-text token follows.

    Returns:
        input_ids, and labels of the same length, not shifted.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    encoded = tokenizer(completion, add_special_tokens=False, split_special_tokens=True)
    completion_ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": [*prompt_ids, *completion_ids],
        "labels": [IGNORED] * len(prompt_ids) + completion_ids,
    }


def encode_examples(
    tokenizer: Any, pairs: Iterable[tuple[str, str]], *, max_tokens: int | None
) -> tuple[list[dict[str, list[int]]], int]:
    """The examples of at most `max_tokens` tokens, and how many are longer.

    Raises:
        RunError: all of them are.
    """
    examples = [encode_example(tokenizer, prompt, completion) for prompt, completion in pairs]
    kept = [example for example in examples if max_tokens is None or len(example["input_ids"]) <= max_tokens]
    if not kept:
        raise RunError(
            f"each of the {len(examples)} examples is longer than max_tokens = {max_tokens}; raise it"
        )
    return kept, len(examples) - len(kept)
