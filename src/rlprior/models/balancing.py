"""Auxiliary-loss-free balancing of a mixture of experts: a selection bias per expert, moved after each optimizer step.

The bias decides which experts a token is routed to, never how much they count for: no gradient reaches it and none is added to the
loss. Shape suffixes: N tokens, K chosen experts of a token, E experts, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ExpertBalancer:
    """Counts the tokens that each expert receives in training, and moves the routers' bias towards an even load.

    b_e <- b_e + rate * sign(mean load - load_e), then b <- b - mean(b), once per `update`.

    The load is that of every position of a batch, padding and ignored targets included: each is computed by the experts it is routed
    to. No token is ever dropped.

    Counted are forward passes in training mode through the body of the model, so that a block that activation checkpointing computes
    again during the backward pass, reentrant or not, counts once; micro-batches add up.

    Source: Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664, algorithm 1; the rate is
    DeepSeek-V3's, arXiv:2412.19437, section 4.2.
    Differs: the bias is recentred, which changes no choice and keeps its size meaningful.
    """

    def __init__(self, bodies: list[nn.Module], routers: list[Any], rate: float) -> None:
        self.rate = rate
        self.relative_load: list[list[float]] = []
        self._tallies = [_Tally(router) for router in routers]
        self._is_counting = False
        self._handles: list[RemovableHandle] = []
        for body in bodies:
            self._handles += [
                body.register_forward_pre_hook(self._start_counting),
                body.register_forward_hook(self._stop_counting, always_call=True),
            ]
        for tally in self._tallies:
            self._handles.append(tally.router.register_forward_hook(self._hook(tally)))

    @classmethod
    def attach(cls, model: nn.Module, *, rate: float) -> ExpertBalancer:
        """Watch the routers of `model`, whatever wraps it; with none of them (a dense model) `update` does nothing.

        Args:
            model: holds a Dots1 model, sharded by FSDP2 or not. Its biases are made float32 if they are not: a step of 0.001 is lost
                in the rounding of bfloat16.
            rate: step of the bias; 0 only measures.

        Raises:
            ValueError: a rate below 0.
        """
        from transformers.models.dots1.modeling_dots1 import Dots1Model, Dots1TopkRouter

        if not rate >= 0:
            raise ValueError(f"rate must be 0 or more, not {rate}")
        modules = list(model.modules())
        routers: list[Any] = [module for module in modules if isinstance(module, Dots1TopkRouter)]
        for router in routers:
            router.e_score_correction_bias = router.e_score_correction_bias.float()
        return cls([module for module in modules if isinstance(module, Dots1Model)], routers, rate)

    def update(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Move the biases by the load since the last update or reset, and start to count anew.

        Call it on every rank after each optimizer step. A step that is skipped calls `reset` instead.

        Args:
            group: ranks whose loads are added up; None for all of them, as everywhere in torch.distributed. Without a process group
                (one process) nothing is exchanged.

        Returns:
            For each step: max_violation_mean and max_violation_max, over layers, of max_e load_e / mean load - 1 (0 is even);
            routing_entropy_nats, the mean over layers and tokens of the entropy of the scores normalised to 1; dropped_tokens, always
            0. `relative_load[layer][expert]` then holds load / mean load. Empty for a dense model.

        Raises:
            RuntimeError: no token was routed.
        """
        if not self._tallies:
            return {}
        tallied = torch.stack([tally.sums for tally in self._tallies])
        self.reset()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tallied, group=group)
        tallied = tallied.cpu()
        load_LE, entropy_L = tallied[:, :-1], tallied[:, -1]
        if not bool((load_LE.sum(1) > 0).all()):
            raise RuntimeError(
                "no token was routed since the last update: run the model in training mode first"
            )
        mean_L1 = load_LE.mean(1, keepdim=True)
        if self.rate > 0:
            for tally, step_E in zip(self._tallies, self.rate * (mean_L1 - load_LE).sign(), strict=True):
                tally.move_bias(step_E)
        self.relative_load = (load_LE / mean_L1).tolist()
        violation_L = (load_LE / mean_L1).amax(1) - 1
        num_tokens_L = load_LE.sum(1) / torch.tensor([tally.experts_per_token for tally in self._tallies])
        return {
            "max_violation_mean": float(violation_L.mean()),
            "max_violation_max": float(violation_L.max()),
            "routing_entropy_nats": float((entropy_L / num_tokens_L).mean()),
            "dropped_tokens": 0.0,
        }

    def reset(self) -> None:
        """Forget what was counted."""
        for tally in self._tallies:
            tally.clear()

    def detach(self) -> None:
        """Stop watching the model; its biases stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _start_counting(self, body: nn.Module, inputs: Any) -> None:
        self._is_counting = body.training

    def _stop_counting(self, body: nn.Module, inputs: Any, output: Any) -> None:
        self._is_counting = False

    def _hook(self, tally: _Tally) -> Any:
        def count(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            # a pass outside the body's own is a recomputation in the backward pass
            if self._is_counting:
                logits_NE, _, chosen_NK = output
                tally.add(logits_NE.detach(), chosen_NK)

        return count


class _Tally:
    """What one router has done since it was last cleared: tokens of each expert and, last, the summed entropy of its scores."""

    def __init__(self, router: Any) -> None:
        self.router = router
        self.experts_per_token: int = router.top_k
        self._sums: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """[E + 1], float64: counts are exact, and one all-reduce serves both."""
        if self._sums is None:
            bias_E = self.router.e_score_correction_bias
            return torch.zeros(len(bias_E) + 1, dtype=torch.float64, device=bias_E.device)
        return self._sums

    @torch.no_grad()
    def add(self, logits_NE: Tensor, chosen_NK: Tensor) -> None:
        """Count one forward pass."""
        chosen = chosen_NK.flatten()
        load_E = torch.zeros(logits_NE.shape[-1], dtype=torch.long, device=chosen.device)
        load_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        log_share_NE = nn.functional.logsigmoid(logits_NE).log_softmax(-1)
        entropy = -(log_share_NE.exp() * log_share_NE).sum(dtype=torch.float64)
        self._sums = self.sums + torch.cat([load_E.double(), entropy[None]])

    @torch.no_grad()
    def move_bias(self, step_E: Tensor) -> None:
        """One step, recentred, in place."""
        bias_E = self.router.e_score_correction_bias
        bias_E.add_(step_E.to(bias_E))
        bias_E.sub_(bias_E.mean())

    def clear(self) -> None:
        """Forget."""
        self._sums = None
