"""The shaped loss in a plain PyTorch loop, with gradient accumulation that does not depend on the micro-batches.

python examples/loss/plain_loop.py
"""

import torch
from torch import nn

from rlprior.objectives import RewardShaping, linear_shaped_cross_entropy

VOCABULARY, WIDTH, IGNORED = 64, 32, -100


class Model(nn.Module):
    """Any model that returns hidden states before its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(tokens))[0]


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shaping = RewardShaping(beta=-0.25)
    tokens = (torch.arange(17) + torch.arange(8)[:, None]) % VOCABULARY  # each row counts upwards
    targets = tokens[:, 1:].clone()
    targets[:4, :8] = IGNORED  # half of the rows have a prompt that is not trained on

    for step in range(20):
        num_targets = int(
            (targets != IGNORED).sum()
        )  # of the whole batch; all-reduce it where there are several ranks
        cross_entropy = 0.0
        for rows in torch.arange(8).split(2):
            loss, metrics = linear_shaped_cross_entropy(
                model(tokens[rows, :-1]),
                model.output.weight,
                targets[rows],
                shaping,
                ignore_index=IGNORED,
                reduction="sum",
                return_metrics=True,
            )
            (
                loss / num_targets
            ).backward()  # DistributedDataParallel averages over ranks: multiply by their number
            cross_entropy += float(metrics.cross_entropy.nansum()) / num_targets
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}: cross-entropy {cross_entropy:.3f} nats")


if __name__ == "__main__":
    main()
