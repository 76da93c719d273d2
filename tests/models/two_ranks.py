"""One rank of two that shard a mixture of experts and end with the selection biases of one process; run by torchrun or the test."""

from __future__ import annotations

from typing import Any

import torch
from tests.models.conftest import SMALL_MIXTURE
from tests.models.test_balancing import biases, random_ids, train_on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlprior.models.balancing import ExpertBalancer
from rlprior.models.causal_lm import huggingface_config, new_model
from rlprior.world import World, end_process, join_world

NUM_STEPS = 3


def small_model() -> Any:
    torch.manual_seed(0)
    return new_model(
        huggingface_config(SMALL_MIXTURE.shape, 256, initializer_range=SMALL_MIXTURE.initializer_range)
    ).train()


def expected_biases() -> torch.Tensor:
    model = small_model()
    balancer = ExpertBalancer.attach(model, rate=0.01)
    for seed in range(NUM_STEPS):
        train_on(model, random_ids(seed=seed))
        balancer.update()
    return biases(model)


def main() -> None:
    torch.set_num_threads(1)
    expected = expected_biases()
    with join_world() as world:
        assert_same_biases(world, expected)
    print("same biases")
    end_process(0)


def assert_same_biases(world: World, expected: torch.Tensor) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = small_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.model.parameters())
    balancer = ExpertBalancer.attach(model, rate=0.01)
    for seed in range(NUM_STEPS):
        # unequal parts, in two micro-batches each
        for rows in (slice(0, 3), slice(3, 4)) if world.is_main else (slice(4, 5), slice(5, 6)):
            train_on(model, random_ids(seed=seed)[rows])
        balancer.update()
    assert torch.equal(biases(model), expected)
    assert expected.abs().max() > 0


if __name__ == "__main__":
    main()
