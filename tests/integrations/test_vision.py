"""Patched models that see images: their own loss where shaping is zero, and one gradient in any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.small_models import SHAPE, VOCABULARY, assert_same_gradients, gradients
from tests.integrations.steps import take_batch
from tests.integrations.trainers import run_trainer
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rlprior.integrations.huggingface import patch_model
from rlprior.objectives import CrossEntropy

START, IMAGE, END = VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1
EYE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def gemma3() -> Any:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SHAPE, "head_dim": 8},
            vision_config=EYE,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )


def llava() -> Any:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={**SHAPE, "model_type": "llama"},
            vision_config={**EYE, "model_type": "clip_vision_model", "projection_dim": 8},
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )


def qwen3_vl() -> Any:
    eye = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": SHAPE["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={**SHAPE, "head_dim": 8, "rope_parameters": ROPE},
            vision_config=eye,
            image_token_id=IMAGE,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
    )


MODELS = {"gemma3": gemma3, "llava": llava, "qwen3_vl": qwen3_vl}


def make_model(name: str) -> Any:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().train()


def make_batch(name: str, rows: slice = slice(3)) -> dict[str, Tensor]:
    """An image of four tokens in each row, then words, of which each row trains on a number of its own."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(START, (3, 7), generator=generator)
    image = torch.tensor([START, *[IMAGE] * 4, END]).expand(3, 6)
    ids = torch.cat([image, words], dim=1)
    num_trained = torch.tensor([[1], [6], [3]])
    labels = torch.where(torch.arange(13) >= 13 - num_trained, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if name == "qwen3_vl":
        patches = torch.randn(3, 16, 12, generator=generator)
        batch |= {
            "mm_token_type_ids": (ids == IMAGE).int(),
            "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(3, 3),
        }
        chosen = {key: value[rows] for key, value in batch.items()}
        return {**chosen, "pixel_values": patches[rows].flatten(0, 1)}
    batch["pixel_values"] = torch.randn(3, 3, 8, 8, generator=generator)
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    return {key: value[rows] for key, value in batch.items()}


def own_gradients(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's own mean loss of all rows and its gradients, which reach the image encoder."""
    model = make_model(name)
    loss = model(**make_batch(name)).loss
    loss.backward()
    found = gradients(model)
    eye = [
        gradient for parameter, gradient in found.items() if "vis" in parameter or "projector" in parameter
    ]
    assert any(gradient.any() for gradient in eye)
    return loss.detach(), found


@pytest.mark.parametrize("name", MODELS)
def test_zero_shaping_is_the_models_own_loss(name: str):
    model = make_model(name)
    patch_model(model, CrossEntropy())
    outputs = model(**make_batch(name))
    outputs.loss.backward()
    loss, expected = own_gradients(name)
    torch.testing.assert_close(outputs.loss, loss, rtol=1e-5, atol=0)  # a sum of ten float32 losses
    assert outputs.logits is None
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_trainer_has_the_gradient_of_one_batch(name: str, tmp_path: Path):
    """Some of these models tell a Trainer that they take no count of targets, and leave it to average means."""
    model = make_model(name)
    patch_model(model, CrossEntropy())
    dataset = [
        {key: value.tolist() for key, value in make_batch(name, rows).items()}
        for rows in (slice(2), slice(2, 3))
    ]
    found = run_trainer(
        model, tmp_path, batch_size=1, accumulation=2, train_dataset=dataset, data_collator=take_batch
    )
    assert_same_gradients(found, own_gradients(name)[1])
