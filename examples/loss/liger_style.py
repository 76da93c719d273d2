"""The shaped loss where a training script calls Liger's fused linear cross-entropy.

python examples/loss/liger_style.py
"""

import torch
from torch import nn

# from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from rlprior.integrations.liger import FusedLinearShapedCrossEntropyLoss
from rlprior.objectives import RewardShaping


def main() -> None:
    torch.manual_seed(0)
    body, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    tokens = torch.arange(65) % 64
    # loss_fn = LigerFusedLinearCrossEntropyLoss()
    loss_fn = FusedLinearShapedCrossEntropyLoss(RewardShaping(beta=-0.25))
    loss = loss_fn(head.weight, body(tokens[:-1]), tokens[1:])
    loss.backward()
    assert head.weight.grad is not None
    print(f"loss {float(loss.detach()):.3f}, gradient norm {float(head.weight.grad.norm()):.4f}")


if __name__ == "__main__":
    main()
