"""The loss under the names and in the argument orders of Liger's fused linear cross-entropy.

Shape suffixes: N flattened positions, V vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlprior.integrations.next_token import IGNORE_INDEX, start_draws
from rlprior.objectives import Objective, linear_shaped_cross_entropy
from rlprior.objectives.linear import Reduction


def fused_linear_shaped_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    shaping: Objective,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    lse_square_scale: float = 0.0,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loss of the logits `input @ weight.T`, called like `liger_fused_linear_cross_entropy`.

    Args:
        input: [N, D].
        weight: [V, D].
        target: [N], already shifted.
        shaping: settings of any objective.
        bias: None; it has the place that Liger gives it.
        ignore_index: target of positions that count for nothing.
        lse_square_scale: coefficient of the squared log-normaliser, `z_loss` elsewhere.
        reduction: "mean" over the targets that are not ignored, "sum" or "none".
        softcap: c > 0 where the model's logits are `c tanh(z / c)`.
        generator: as in `linear_shaped_cross_entropy`.

    Raises:
        ValueError: a bias, or inputs or options that do not fit.

    Differs: Liger's other options are unknown here. Label smoothing and token scaling are objectives: give
    `LabelSmoothing` or `DynamicFineTuning` as `shaping`.
    """
    if bias is not None:
        raise ValueError("bias must be None: rlprior knows output layers without a bias only")
    return linear_shaped_cross_entropy(
        input,
        weight,
        target,
        shaping,
        ignore_index=ignore_index,
        reduction=reduction,
        generator=generator,
        logit_softcap=softcap,
        z_loss=lse_square_scale,
    )


class FusedLinearShapedCrossEntropyLoss(nn.Module):
    """The same as a module in place of `LigerFusedLinearCrossEntropyLoss`; its options are the function's.

    >>> from rlprior.objectives import RewardShaping
    >>> loss = FusedLinearShapedCrossEntropyLoss(RewardShaping(beta=-0.25))
    >>> loss(torch.zeros(4, 2), torch.ones(1, 2), torch.tensor([3]))
    tensor(1.5373)
    """

    def __init__(
        self,
        shaping: Objective,
        *,
        ignore_index: int = IGNORE_INDEX,
        lse_square_scale: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.shaping = shaping
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.reduction: Reduction = reduction
        self.softcap = softcap
        self._draws = start_draws(shaping)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Loss of the logits `_input @ lin_weight.T`: weight [V, D] first, then input [N, D] and target [N]."""
        return fused_linear_shaped_cross_entropy(
            _input,
            lin_weight,
            target,
            self.shaping,
            bias,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            reduction=self.reduction,
            softcap=self.softcap,
            generator=self._draws,
        )
