"""Models: the same weights for the same seed, documents kept apart, and folders that anyone can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlprior.config import UsageError
from rlprior.data.packing import attention_mask
from rlprior.models.causal_lm import (
    build_model,
    evaluation_mode,
    head_weight,
    load_model,
    load_tokenizer,
    packed_hidden_states,
    save_model,
)
from rlprior.models.presets import ModelConfig

ONE_LAYER = ModelConfig(
    num_layers=1, hidden_size=16, intermediate_size=16, num_heads=2, num_key_value_heads=1, head_dim=8
)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same_weights(one: Any, other: Any) -> bool:
    left, right = weights_of(one), weights_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# build


def test_the_seed_alone_decides_the_weights(tokenizer: Any) -> None:
    def build(seed: int) -> Any:
        return build_model(ONE_LAYER, tokenizer, max_positions=32, seed=seed)

    first = build(3)
    torch.rand(5)  # whatever ran before
    assert same_weights(first, build(3))
    assert not same_weights(first, build(4))


def test_building_leaves_the_global_stream_alone(tokenizer: Any) -> None:
    before = torch.get_rng_state()
    build_model(ONE_LAYER, tokenizer, max_positions=32, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fresh_model_has_the_shape_and_the_spread_asked_for(tokenizer: Any) -> None:
    config = ModelConfig(num_layers=2, tied_embeddings=False, initializer_range=0.05, rope_theta=5e4)
    model = build_model(config, tokenizer, max_positions=77, seed=0)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 77
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(model.model.layers) == 2
    assert head_weight(model) is not model.get_input_embeddings().weight
    for name, weight in weights_of(model).items():
        if weight.ndim == 2:
            # 4 standard errors of a sample deviation
            assert weight.std().item() == pytest.approx(0.05, rel=4 / (2 * weight.numel()) ** 0.5), name
        else:
            assert torch.equal(weight, torch.ones_like(weight)), name
    dimension = torch.arange(0, 32, 2) / 32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 5e4**-dimension)


# packed rows


def test_a_packed_row_is_its_documents_each_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [[7, 1, 12], [20], [9, 11]]
    documents = [[torch.randint(3, 250, (length,), generator=generator) for length in row] for row in lengths]
    ids = torch.stack([torch.cat(row) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    owners = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    with evaluation_mode(model):
        packed = packed_hidden_states(model, ids, positions, attention_mask(owners))
        alone = [
            torch.cat([model.model(input_ids=document[None]).last_hidden_state[0] for document in row])
            for row in documents
        ]
        leaking = packed_hidden_states(model, ids, positions, attention_mask(torch.zeros_like(owners)))
    # float32 sums in another order
    torch.testing.assert_close(packed, torch.stack(alone), atol=1e-5, rtol=1e-5)
    # the comparison can fail: looking across the border changes the later documents
    assert (leaking[0, 7:] - packed[0, 7:]).abs().max() > 0.1


def test_no_gradient_crosses_a_document_border(model: Any) -> None:
    owners = torch.tensor([[0, 0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    embedded: list[torch.Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output.retain_grad() or output)
    )
    try:
        ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
        hidden = packed_hidden_states(model, ids, positions, attention_mask(owners))
        hidden[0, 4].sum().backward()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    gradient = embedded[0].grad
    assert gradient is not None
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [False, False, False, True, True, False]


# folders


@pytest.fixture
def folder(model: Any, tokenizer_directory: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_model(model, directory, tokenizer_directory=tokenizer_directory)
    return directory


def test_a_saved_folder_loads_anywhere_and_here(model: Any, tokenizer: Any, folder: Path) -> None:
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load_model(folder)
    assert same_weights(theirs, model)
    assert same_weights(ours, model)
    assert ours.dtype == torch.float32
    assert head_weight(ours) is ours.get_input_embeddings().weight  # tied stays tied
    text = "four + 5 = nine"
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.eos_token_id == tokenizer.eos_token_id


def test_loading_and_saving_show_no_bar(
    model: Any, folder: Path, tokenizer_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(load_model(folder), folder, tokenizer_directory=tokenizer_directory)
    assert capfd.readouterr().err == ""


def test_a_raised_rotary_base_is_used_and_kept(
    model: Any, folder: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    raised = load_model(folder, rope_theta=1e6, max_positions=512)
    expected = 1e6 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(raised.model.rotary_emb.inv_freq, expected)
    assert not torch.allclose(model.model.rotary_emb.inv_freq, expected)
    assert same_weights(raised, model)
    save_model(raised, tmp_path / "raised", tokenizer_directory=tokenizer_directory)
    for again in (
        load_model(tmp_path / "raised"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "raised"),
    ):
        torch.testing.assert_close(again.model.rotary_emb.inv_freq, expected)
        assert again.config.max_position_embeddings == 512
    # the positions of a model are never cut
    assert load_model(folder, max_positions=4).config.max_position_embeddings == 128


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_is_no_model_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    def refused(directory: Path) -> str:
        with pytest.raises(UsageError) as error:
            load_model(directory)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"{directory}: ")
        return str(error.value)

    def spoil(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    assert "config.json is missing" in refused(tmp_path / "nowhere")
    broken = spoil("broken")
    (broken / "config.json").write_text("{")
    assert "not a valid JSON" in refused(broken)
    unknown = spoil("unknown")
    change_config(unknown, model_type="nonesuch")
    assert "nonesuch" in refused(unknown)
    headless = spoil("headless")
    (headless / "model.safetensors").unlink()
    assert "model.safetensors" in refused(headless)
    torn = spoil("torn")
    (torn / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    refused(torn)
    misshapen = spoil("misshapen")
    change_config(misshapen, hidden_size=64)
    assert refused(misshapen).endswith("its weights do not have the shapes that its config.json says")
    partial = spoil("partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    assert refused(partial).endswith("its weights lack model.norm.weight")


def test_a_pickle_is_not_opened(model: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no file named model\.safetensors"):
        load_model(folder)


def test_a_model_without_one_rotary_base_refuses_another(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(tmp_path)
    assert load_model(tmp_path, max_positions=8).config.max_position_embeddings == 8
    with pytest.raises(UsageError, match="has learned positions, 8 of them; 16 do not fit"):
        load_model(tmp_path, max_positions=16)
    with pytest.raises(UsageError, match="no rotary embedding with one base; leave rope_theta out"):
        load_model(tmp_path, rope_theta=1e6)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_mode_gives_the_former_mode_back(was_training: bool) -> None:
    layer = torch.nn.Sequential(torch.nn.Dropout(0.5)).train(was_training)
    with evaluation_mode(layer):
        assert not layer.training
        assert torch.is_inference_mode_enabled()
    assert layer.training is layer[0].training is was_training
    with pytest.raises(KeyError), evaluation_mode(layer):
        raise KeyError
    assert layer.training is was_training
