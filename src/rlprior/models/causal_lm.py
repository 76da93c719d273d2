"""Hugging Face causal language models: build, load, save, and the forward pass that stages share."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlprior.config import UsageError
from rlprior.models.presets import ModelConfig, Shape
from rlprior.seeding import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# B rows, T positions, D width


def huggingface_config(shape: Shape, vocab_size: int, **options: Any) -> PreTrainedConfig:
    """Hugging Face configuration of a shape; `options` are any of its other fields.

    Dense: Qwen3. Mixture of experts: dots.llm1, which is Qwen3's attention with DeepSeek-V3's router: scores `s = sigmoid(W h)`, the
    k experts with the largest `s + b` (b the selection bias of `rlprior.models.balancing`), weighted by their `s` normalised to 1.
    Every layer has experts; there is no shared expert and one group.

    Differs: the paper names neither the router's scores nor their normalisation; both are DeepSeek-V3's, whose balancing it uses.
    """
    from transformers import Dots1Config, Qwen3Config

    options = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
        **options,
    }
    if not shape.num_experts:
        return Qwen3Config(**options)
    # read by vLLM, which has no default for them, and no selection bias without the first
    options |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    return Dots1Config(
        moe_intermediate_size=shape.intermediate_size,
        n_routed_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_token,
        n_shared_experts=0,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        sliding_window=None,
        **options,
    )


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A freshly initialised causal model of a Hugging Face configuration; under `torch.device("meta")` one without memory."""
    from transformers import AutoModelForCausalLM

    if _is_routed_only(config):
        from rlprior.models.dots1 import Dots1ForCausalLM

        return Dots1ForCausalLM(cast(Any, config))
    return AutoModelForCausalLM.from_config(config)


def _is_routed_only(config: Any) -> bool:
    return config.model_type == "dots1" and config.n_shared_experts == 0


def build_model(config: ModelConfig, tokenizer: Any, *, max_positions: int, seed: int) -> PreTrainedModel:
    """A freshly initialised model of a shape; the same weights for the same seed, whatever the objective.

    Initialisation is the class's own: normal with standard deviation `initializer_range` for every matrix (embeddings, attention,
    experts and routers alike, without scaling by depth), norms 1, the row of the padding token and the selection bias 0.
    """
    options = huggingface_config(
        config.shape,
        len(tokenizer),
        max_position_embeddings=max_positions,
        initializer_range=config.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, "model"))
        return new_model(options)


def load_model(
    path: Path, *, rope_theta: float | None = None, max_positions: int | None = None
) -> PreTrainedModel:
    """A causal model from a Hugging Face folder on disk, in float32.

    Args:
        path: the folder.
        rope_theta: raise the base of the rotary embedding (mid-training: 1e4 -> 1e6).
        max_positions: the new longest sequence.

    Raises:
        UsageError: not a folder with a causal language model and all its weights, as safetensors (a pickle runs what it likes), or
            not a rotary embedding with one base.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    require_model_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
        _extend(config, path, rope_theta, max_positions)
        model_class: Any = AutoModelForCausalLM
        if _is_routed_only(config):
            from rlprior.models.dots1 import Dots1ForCausalLM

            model_class = Dots1ForCausalLM
        with _without_bars():
            loaded: Any = model_class.from_pretrained(
                path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except RuntimeError:
        raise UsageError(f"{path}: its weights do not have the shapes that its config.json says") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{path}: cannot be loaded as a causal language model: {str(error).splitlines()[0]}"
        ) from None
    model, report = loaded
    if report["missing_keys"]:  # the library would go on with random numbers in their place
        raise UsageError(f"{path}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def _extend(config: Any, path: Path, rope_theta: float | None, max_positions: int | None) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope_theta is not None:
        if "rope_theta" not in rope:
            raise UsageError(f"{path}: has no rotary embedding with one base; leave rope_theta out")
        config.rope_parameters = {**rope, "rope_theta": rope_theta}
    if max_positions is not None and max_positions > config.max_position_embeddings:
        if not rope:
            raise UsageError(
                f"{path}: has learned positions, {config.max_position_embeddings} of them; {max_positions} do not fit"
            )
        config.max_position_embeddings = max_positions


def require_model_folder(path: Path) -> None:
    """UsageError unless `path` looks like a Hugging Face model folder."""
    if not (path / "config.json").is_file():
        raise UsageError(f"{path}: not a Hugging Face model folder (config.json is missing)")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").is_file():
        raise UsageError(f"{path}: holds no tokenizer.json")
    return AutoTokenizer.from_pretrained(path)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar of the library's while a model of ours is read or written: a run has its own."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def save_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    tokenizer_directory: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors), config and tokenizer as one Hugging Face folder; `weights` where the model's own are sharded."""
    with _without_bars():
        model.save_pretrained(directory, state_dict=weights)
    for file in sorted(tokenizer_directory.glob("*")):
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copyfile(file, directory / file.name)


def packed_hidden_states(
    model: Any, input_ids_BT: Tensor, position_ids_BT: Tensor, attention_mask_B1TT: Tensor
) -> Tensor:
    """Last hidden states [B, T, D] of packed rows, under an explicit boolean mask (True: may attend)."""
    output = model.model(
        input_ids=input_ids_BT,
        position_ids=position_ids_BT,
        attention_mask=attention_mask_B1TT,
        use_cache=False,
    )
    return output.last_hidden_state


def head_weight(model: Any) -> Tensor:
    """Output embedding [V, D]."""
    return model.get_output_embeddings().weight


def last_hidden_states(model: Any, input_ids_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, D] of rows that begin at their first column; what pads them on the right is never looked at."""
    return model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state


def logit_softcap(model: Any) -> float | None:
    """c where the model's logits are `c tanh(z / c)` of its head's output z, as in Gemma 2."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def require_linear_head(model: Any) -> None:
    """UsageError unless the model's logits are its last hidden states times its output embedding, softcap included.

    A loss that multiplies the two itself, chunk by chunk, would leave a bias or a factor out.
    """
    ids_BT = torch.tensor([[0, 1]], device=head_weight(model).device)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    found_BTV = (last_hidden_states(model, ids_BT) @ head_weight(model).T).float()
    if (cap := logit_softcap(model)) is not None:
        found_BTV = cap * torch.tanh(found_BTV / cap)
    # the same product in another order: a few roundings of the largest logit
    tolerance = 64 * torch.finfo(head_weight(model).dtype).eps * float(logits_BTV.abs().max())
    if not torch.allclose(found_BTV, logits_BTV, rtol=0, atol=max(tolerance, 1e-6)):
        raise UsageError(
            f"{type(model).__name__}: its logits are not its hidden states times its output embedding (a bias or a factor); "
            "such a head is not supported"
        )


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """`eval()` and no gradients inside, the former mode after."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `dtype`; None leaves them as they are."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
