"""Stands in for the `vllm` package: the part of its interface that `VllmEngine` uses, with vLLM's names, types and strictness.

Written after the signatures of vLLM's `LLM`, `SamplingParams`, `RequestOutput`, `CompletionOutput` and `Logprob`; a keyword that they do not
have is an error here too. It computes with Hugging Face's model, one response at a time, without a cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlprior.sampling.sampler import Decoding, draw


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    logprobs: int | None = None
    seed: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class ServedModel(nn.Module):
    """The model inside a worker; weights come under the names of the Hugging Face checkpoint."""

    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own = dict(self.inner.named_parameters())
        loaded = set()
        for name, tensor in weights:
            with torch.no_grad():
                own[name].copy_(tensor)
            loaded.add(name)
        return loaded


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.92,
        distributed_executor_backend: str | None = None,
        logprobs_mode: str = "raw_logprobs",
        hf_overrides: dict[str, Any] | None = None,
    ) -> None:
        assert Path(model).is_dir()
        assert logprobs_mode == "processed_logprobs"
        config = {**json.loads((Path(model) / "config.json").read_text()), **(hf_overrides or {})}
        assert (max_model_len or 0) <= config["max_position_embeddings"]
        self.served = ServedModel(model, dtype)
        self.max_model_len = max_model_len
        self.has_stale_cache = False

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        self.has_stale_cache = True
        return [func(self.served)]

    def reset_prefix_cache(self) -> bool:
        self.has_stale_cache = False
        return True

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert not use_tqdm
        assert not self.has_stale_cache, "keys and values of the former weights"
        assert len(prompts) == len(sampling_params)
        answers = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert prompt.keys() == {"prompt_token_ids"}
            generator = torch.Generator().manual_seed(params.seed or 0)
            outputs = [
                self._complete(index, prompt["prompt_token_ids"], params, generator)
                for index in range(params.n)
            ]
            answers.append(RequestOutput(outputs))
        return answers

    def _complete(
        self, index: int, prompt: list[int], params: SamplingParams, generator: torch.Generator
    ) -> CompletionOutput:
        decoding = Decoding(temperature=params.temperature, top_p=params.top_p, max_new_tokens=1)
        token_ids: list[int] = []
        log_probs: list[dict[int, Logprob]] = []
        while len(token_ids) < params.max_tokens:
            ids = torch.tensor([[*prompt, *token_ids]])
            assert self.max_model_len is None or ids.shape[1] <= self.max_model_len
            logits = self.served.inner(input_ids=ids, use_cache=False).logits[:, -1]
            token, log_prob = draw(logits, torch.rand(1, generator=generator, dtype=torch.float64), decoding)
            token_ids.append(int(token))
            log_probs.append({int(token): Logprob(float(log_prob))})
            if token_ids[-1] in params.stop_token_ids:
                return CompletionOutput(index, "", tuple(token_ids), log_probs, "stop")
        return CompletionOutput(index, "", tuple(token_ids), log_probs, "length")
