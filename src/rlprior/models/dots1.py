"""The Hugging Face class of our mixtures of experts, without the zero-sized shared expert that it would otherwise carry.

`transformers.Dots1ForCausalLM` builds a shared expert of width `moe_intermediate_size * n_shared_experts`: with 0 of them three empty
matrices a layer, which would be trained, sharded and exported, and which no reader of the folder wants. Imports transformers: import
this file where a model is built.
"""

from __future__ import annotations

import warnings

import transformers
from torch import Tensor, nn
from transformers.models.dots1.modeling_dots1 import Dots1MoE


class NoSharedExpert(nn.Module):
    """Adds nothing to the routed experts' output."""

    def forward(self, hidden: Tensor) -> float:
        """The number 0, whatever the input."""
        return 0.0


class Dots1ForCausalLM(transformers.Dots1ForCausalLM):
    """Routed experts alone. Its name is its parent's, for a saved folder states the name of the class.

    Raises:
        ValueError: the configuration asks for shared experts.
    """

    # by it the library decides how the weights of a class are named in files, and whether experts may use its grouped product
    __module__ = transformers.Dots1ForCausalLM.__module__

    def __init__(self, config: transformers.Dots1Config) -> None:
        if config.n_shared_experts != 0:
            raise ValueError(f"n_shared_experts = {config.n_shared_experts} must be 0")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op", UserWarning)
            super().__init__(config)
        for module in self.modules():
            if isinstance(module, Dots1MoE):
                module.add_module("shared_experts", NoSharedExpert())
