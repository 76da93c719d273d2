"""Who draws the responses: the sampler of this package, or vLLM on the same GPUs.

An engine holds the policy's weights of the last `load`. Each process of a world has one of its own and draws whole groups.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.distributed.tensor import DTensor

from rlprior.config import HOW, UsageError
from rlprior.models.causal_lm import autocast, evaluation_mode
from rlprior.sampling.sampler import Decoding, Response, sample
from rlprior.world import World


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Who draws the responses.

    Args:
        engine: 'builtin' is this package's sampler; 'vllm' runs vLLM on the trainer's GPUs.
        max_rows: responses that 'builtin' draws at a time, whole groups; the keys and values of all of them are held at once.
        gpu_memory_utilization: share of a GPU's memory that vLLM takes for its weights and cache, in (0, 1).
    """

    engine: Literal["builtin", "vllm"] = "builtin"
    max_rows: int = field(default=512, metadata=HOW)
    gpu_memory_utilization: float = field(default=0.3, metadata=HOW)

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {self.max_rows}")
        if not 0 < self.gpu_memory_utilization < 1:
            raise ValueError(
                f"gpu_memory_utilization must be above 0 and below 1, not {self.gpu_memory_utilization}"
            )


class RolloutEngine(Protocol):
    """Draws responses from the policy."""

    def load(self, model: Any) -> None:
        """Take over the weights of `model`, whole or sharded; every process of the world calls it after each update."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        decoding: Decoding,
        eos_token_id: int,
        generators: Sequence[Sequence[torch.Generator]],
    ) -> list[list[Response]]:
        """Responses of each prompt, with the log-probabilities of the distribution that they were drawn from.

        Args:
            prompts: token ids of each, at least one prompt.
            decoding: temperature, nucleus, length.
            eos_token_id: ends a response.
            generators: of each prompt, one a sample: what is drawn does not depend on the process that draws it.
        """
        ...


class BuiltinEngine:
    """The sampler of `rlprior.sampling.sampler`: with the policy itself where one process has it whole, or else with a copy."""

    def __init__(
        self, model: Any, autocast_dtype: torch.dtype | None, world: World, *, max_rows: int
    ) -> None:
        """Prepare, to draw at most `max_rows` responses at a time; to be called before the model is sharded."""
        self.max_rows = max_rows
        is_whole = world.size == 1
        self.model = model
        if not is_whole:
            self.model = copy.deepcopy(model).to(world.device)
            # as FSDP2 gathers them; buffers (rotary frequencies, the router's bias) stay as precise as the trainer's
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(autocast_dtype or parameter.dtype)
        self.autocast_dtype = autocast_dtype if is_whole else None

    def load(self, model: Any) -> None:
        """Copy the weights, one tensor at a time, where this is not the policy itself."""
        if model is self.model:
            return
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                own[name].copy_(_whole(parameter))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        decoding: Decoding,
        eos_token_id: int,
        generators: Sequence[Sequence[torch.Generator]],
    ) -> list[list[Response]]:
        """As `RolloutEngine.sample`."""
        device = next(self.model.parameters()).device
        size = max(1, self.max_rows // len(generators[0]))
        responses: list[list[Response]] = []
        with evaluation_mode(self.model), autocast(device, self.autocast_dtype):
            for start in range(0, len(prompts), size):
                responses += sample(
                    self.model,
                    prompts[start : start + size],
                    decoding=decoding,
                    eos_token_id=eos_token_id,
                    generators=generators[start : start + size],
                )
        return responses


class VllmEngine:
    """vLLM in the same process, on the same GPU as the trainer; weights are handed over tensor by tensor.

    vLLM computes with other kernels than the trainer: its log-probabilities differ, and `sampler_gap_nats`, `sampler_kl_nats` and
    `importance_cap` exist for that. Two runs with one seed need not draw the same tokens.
    """

    def __init__(
        self, model: Any, policy: Path, config: RolloutConfig, *, max_length: int, dtype: str
    ) -> None:
        """Start vLLM with the weights of a Hugging Face folder.

        Args:
            model: the policy, as the trainer has it.
            policy: its folder.
            config: share of the GPU's memory.
            max_length: longest prompt and response together.
            dtype: 'bfloat16' or 'float32', as the trainer's.

        Raises:
            UsageError: vLLM is not installed, or the policy is a mixture of experts.
        """
        check_engine(config)
        if any(".experts." in name for name, _ in model.named_parameters()):
            raise UsageError(
                f"{policy}: experts have other names and shapes in vLLM than in training; write rl.rollout.engine = 'builtin'"
            )
        # the engine in this process, so that it sees the trainer's tensors
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm  # pyright: ignore[reportMissingImports]

        self._sampling_params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(policy),
            dtype=dtype,
            max_model_len=max_length,
            # the folder may say fewer positions than training has given the model
            hf_overrides={"max_position_embeddings": model.config.max_position_embeddings},
            gpu_memory_utilization=config.gpu_memory_utilization,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            # of the distribution drawn from, temperature and nucleus included
            logprobs_mode="processed_logprobs",
        )

    def load(self, model: Any) -> None:
        """Hand the weights over, and drop what was cached under the former ones."""
        for name, parameter in model.named_parameters():
            weights = [(name, _whole(parameter.detach()))]
            self._engine.apply_model(lambda inner, weights=weights: inner.load_weights(weights))
        self._engine.reset_prefix_cache()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        decoding: Decoding,
        eos_token_id: int,
        generators: Sequence[Sequence[torch.Generator]],
    ) -> list[list[Response]]:
        """As `RolloutEngine.sample`."""
        # vLLM takes one seed a prompt, and makes the samples' of it
        seeds = [int(torch.randint(2**31, (1,), generator=group[0])) for group in generators]
        params = [
            self._sampling_params(
                n=len(generators[0]),
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                stop_token_ids=[eos_token_id],
                logprobs=0,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self._engine.generate(requests, params, use_tqdm=False)
        return [[_response(output) for output in answer.outputs] for answer in answers]


def _response(output: Any) -> Response:
    """From vLLM's `CompletionOutput`: of each position, the log-probability of the token drawn."""
    token_ids = list(output.token_ids)
    log_probs = [of_place[token].logprob for token, of_place in zip(token_ids, output.logprobs, strict=True)]
    return Response(token_ids, log_probs, "stop" if output.finish_reason == "stop" else "length")


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def check_engine(config: RolloutConfig) -> None:
    """UsageError where an engine is asked for that is not installed; nothing is imported."""
    if config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "rl.rollout.engine = 'vllm' needs vLLM; pip install 'rlprior[vllm]', or write 'builtin'"
        )


def open_engine(
    config: RolloutConfig, model: Any, policy: Path, *, max_length: int, precision: str, world: World
) -> RolloutEngine:
    """The engine that a run asks for; to be called before the model is sharded.

    Args:
        config: which.
        model: the policy, whole.
        policy: the same as a Hugging Face folder.
        max_length: longest prompt and response together.
        precision: 'bfloat16' or 'float32', of the trainer's matrix products.
        world: the processes.
    """
    if config.engine == "vllm":
        return VllmEngine(model, policy, config, max_length=max_length, dtype=precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    return BuiltinEngine(model, dtype, world, max_rows=config.max_rows)
