"""The shaped loss in torchtitan: what goes into a configuration, and one step with it as torchtitan takes it.

pip install torchtitan
python examples/loss/torchtitan_config.py
"""

import torch
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper

from rlprior.integrations.torchtitan import shaped_loss_config
from rlprior.objectives import RewardShaping

# Trainer.Config(..., loss=LOSS)
LOSS = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=shaped_loss_config(RewardShaping(beta=-0.25)))


def main() -> None:
    torch.manual_seed(0)
    body, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    tokens = (torch.arange(65) % 64)[None]
    loss_fn = LOSS.build()
    loss_fn.set_lm_head(head)
    loss, _ = loss_fn(body(tokens[:, :-1]), tokens[:, 1:], torch.tensor(64))
    loss.backward()
    assert body.weight.grad is not None
    print(f"loss {float(loss.detach()):.3f}, gradient norm {float(body.weight.grad.norm()):.4f}")


if __name__ == "__main__":
    main()
