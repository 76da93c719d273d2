"""A model small enough for exact comparisons, and large enough that attention decides what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlprior.data.tokenizer import save_tokenizer, train_tokenizer
from rlprior.models.causal_lm import build_model
from rlprior.models.presets import ModelConfig

SMALL = ModelConfig(
    num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, num_key_value_heads=2, head_dim=16
)

SMALL_MIXTURE = ModelConfig(
    preset="tiny-moe",
    num_layers=2,
    hidden_size=32,
    intermediate_size=16,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    # scores far enough apart that loads are uneven
    initializer_range=0.3,
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level, with few merges: about 270 entries."""
    return train_tokenizer(["one two three four five, 1 + 2 = 3; 4 + 5 = 9"], vocab_size=272)


@pytest.fixture(scope="session")
def tokenizer_directory(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer as a Hugging Face folder."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    """Three layers whose matrices are scaled up, so that next-token distributions are far from uniform and from each other."""
    small = build_model(SMALL, tokenizer, max_positions=128, seed=0)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0 if "embed" in name else 8.0)
    return small.eval()
