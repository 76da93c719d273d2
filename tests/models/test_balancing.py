"""Balancing: loads counted once and exactly, the bias's rule, and what it is for."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.models.conftest import SMALL_MIXTURE
from tests.small_study import environment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlprior.models.balancing import ExpertBalancer
from rlprior.models.causal_lm import build_model, evaluation_mode, head_weight
from rlprior.models.presets import ModelConfig
from rlprior.seeding import torch_generator

NUM_EXPERTS, EXPERTS_PER_TOKEN = 8, 2


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return build_model(SMALL_MIXTURE, tokenizer, max_positions=64, seed=0).train()


def random_ids(num_rows: int = 6, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (num_rows, length), generator=torch_generator(seed, "ids"))


def routers(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers]


def biases(model: Any) -> Tensor:
    return torch.stack([router.e_score_correction_bias for router in routers(model)])


def train_on(model: Any, ids: Tensor) -> None:
    """A forward and a backward pass."""
    (model.model(input_ids=ids, use_cache=False).last_hidden_state.square().sum()).backward()


class Recorder:
    """Every output of every router, recomputed ones included."""

    def __init__(self, model: Any) -> None:
        self.outputs: list[list[Any]] = [[] for _ in routers(model)]
        for outputs, router in zip(self.outputs, routers(model), strict=True):
            router.register_forward_hook(lambda _m, _i, output, outputs=outputs: outputs.append(output))

    def loads(self) -> Tensor:
        """Tokens of each expert, one by one."""
        loads = torch.zeros(len(self.outputs), NUM_EXPERTS, dtype=torch.float64)
        for layer, outputs in enumerate(self.outputs):
            for _, _, chosen in outputs:
                for expert in chosen.flatten().tolist():
                    loads[layer, expert] += 1
        return loads


# what is counted


def test_loads_and_metrics_are_those_of_the_routers_own_choices(model: Any) -> None:
    balancer = ExpertBalancer.attach(model, rate=0.0)
    recorder = Recorder(model)
    train_on(model, random_ids())
    metrics = balancer.update()
    loads = recorder.loads()
    assert loads.sum(1).tolist() == [6 * 20 * EXPERTS_PER_TOKEN] * 2
    mean = 6 * 20 * EXPERTS_PER_TOKEN / NUM_EXPERTS
    assert balancer.relative_load == (loads / mean).tolist()
    violations = [max(load) / mean - 1 for load in loads.tolist()]
    assert metrics["max_violation_mean"] == pytest.approx(sum(violations) / 2, rel=1e-12)
    assert metrics["max_violation_max"] == pytest.approx(max(violations), rel=1e-12)
    assert violations[0] != violations[1]
    assert metrics["dropped_tokens"] == 0
    entropies = []
    for outputs in recorder.outputs:
        scores = outputs[0][0].detach().double().sigmoid()
        shares = scores / scores.sum(-1, keepdim=True)
        entropies.append(-(shares * shares.log()).sum(-1).mean().item())
    # logits are float32
    assert metrics["routing_entropy_nats"] == pytest.approx(sum(entropies) / 2, rel=1e-6)


def test_all_tokens_to_the_same_experts_is_the_largest_violation(model: Any) -> None:
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_()
            router.e_score_correction_bias[:EXPERTS_PER_TOKEN] = 1.0
    balancer = ExpertBalancer.attach(model, rate=0.0)
    train_on(model, random_ids())
    metrics = balancer.update()
    assert metrics["max_violation_mean"] == NUM_EXPERTS / EXPERTS_PER_TOKEN - 1
    assert balancer.relative_load[1] == [4.0, 4.0, 0, 0, 0, 0, 0, 0]
    # equal scores: as undecided as can be
    assert metrics["routing_entropy_nats"] == pytest.approx(math.log(NUM_EXPERTS), rel=1e-6)


def checkpointed(forward: Callable[..., Tensor], reentrant: bool) -> Callable[..., Tensor]:
    """A block's forward pass that keeps its input alone."""

    def call(hidden: Tensor, **options: Any) -> Tensor:
        return checkpoint(lambda hidden: forward(hidden, **options), hidden, use_reentrant=reentrant)

    return call


@pytest.mark.parametrize(
    "reentrant", [None, True, False], ids=["no checkpoint", "reentrant", "not reentrant"]
)
def test_a_recomputed_block_counts_once(model: Any, reentrant: bool | None) -> None:
    """The first of two micro-batches is checkpointed: counted twice, it would outweigh the second."""
    ids = random_ids()
    expected = ExpertBalancer.attach(model, rate=0.0)
    train_on(model, ids)
    expected_metrics = expected.update()
    expected.detach()

    balancer = ExpertBalancer.attach(model, rate=0.0)
    recorder = Recorder(model)
    plain = [layer.forward for layer in model.model.layers]
    # a reentrant checkpoint recomputes only where a gradient reaches its input: the embedding's does
    for layer in model.model.layers if reentrant is not None else ():
        layer.forward = checkpointed(layer.forward, reentrant is True)
    train_on(model, ids[:3])
    for layer, forward in zip(model.model.layers, plain, strict=True):
        layer.forward = forward
    train_on(model, ids[3:])
    assert [len(outputs) for outputs in recorder.outputs] == [2 if reentrant is None else 3] * 2
    # float32 logits of other batch sizes
    assert balancer.update() == pytest.approx(expected_metrics, rel=1e-6)
    assert balancer.relative_load == expected.relative_load


def test_micro_batches_add_up(model: Any) -> None:
    ids = random_ids()
    whole = ExpertBalancer.attach(model, rate=0.01)
    train_on(model, ids)
    expected, expected_biases = whole.update(), biases(model).clone()
    whole.detach()
    for router in routers(model):
        router.e_score_correction_bias.zero_()
    balancer = ExpertBalancer.attach(model, rate=0.01)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        train_on(model, ids[start:stop])
    # the counts are whole numbers; the entropy's float64 sum is taken in another order of float32 logits
    assert balancer.update() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(biases(model), expected_biases)
    assert expected_biases.abs().max() > 0


def test_evaluation_is_not_counted(model: Any) -> None:
    balancer = ExpertBalancer.attach(model, rate=0.01)
    with evaluation_mode(model):
        model(input_ids=random_ids())
    with pytest.raises(RuntimeError, match="no token was routed"):
        balancer.update()
    assert not biases(model).any()


def test_every_update_counts_anew_and_a_reset_forgets(model: Any) -> None:
    balancer = ExpertBalancer.attach(model, rate=0.0)
    train_on(model, random_ids(seed=1))
    balancer.update()
    expected = balancer.relative_load
    train_on(model, random_ids(seed=2))
    balancer.update()
    assert balancer.relative_load != expected
    train_on(model, random_ids(seed=2))
    balancer.reset()
    train_on(model, random_ids(seed=1))
    balancer.update()
    assert balancer.relative_load == expected


def test_a_failed_forward_pass_ends_the_counting(model: Any) -> None:
    """What runs a router outside a forward pass of the model, as recomputation does, is not counted even then."""
    balancer = ExpertBalancer.attach(model, rate=0.0)
    with pytest.raises(IndexError):
        model.model(input_ids=torch.tensor([[10**6]]))
    for router in routers(model):
        router(torch.zeros(3, 32))
    with pytest.raises(RuntimeError, match="no token was routed"):
        balancer.update()


def test_detached_it_counts_no_more(model: Any) -> None:
    balancer = ExpertBalancer.attach(model, rate=0.01)
    balancer.detach()
    train_on(model, random_ids())
    with pytest.raises(RuntimeError, match="no token was routed"):
        balancer.update()


# the bias


def test_the_bias_moves_by_the_sign_of_the_missing_load_and_stays_centred(model: Any) -> None:
    balancer = ExpertBalancer.attach(model, rate=0.01)
    recorder = Recorder(model)
    expected = torch.zeros(2, NUM_EXPERTS, dtype=torch.float64)
    for seed in range(3):
        for outputs in recorder.outputs:
            outputs.clear()
        train_on(model, random_ids(seed=seed))
        balancer.update()
        loads = recorder.loads()
        expected += 0.01 * (loads.mean(1, keepdim=True) - loads).sign()
        expected -= expected.mean(1, keepdim=True)
    # a float32 bias of about 0.03
    torch.testing.assert_close(biases(model).double(), expected, atol=1e-8, rtol=0)
    assert expected.abs().max() > 0.02


def test_the_bias_chooses_but_does_not_weigh(model: Any) -> None:
    router = routers(model)[0]
    hidden = torch.randn(5, 32, generator=torch_generator(0, "hidden"))
    with torch.no_grad():
        router.e_score_correction_bias[3] = 10.0
    logits, weights, chosen = router(hidden)
    assert (chosen == 3).any(1).all()
    scores = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))


def test_rate_0_leaves_the_bias_alone(model: Any) -> None:
    with torch.no_grad():
        routers(model)[0].e_score_correction_bias[0] = 0.5
    before = biases(model).clone()
    balancer = ExpertBalancer.attach(model, rate=0.0)
    train_on(model, random_ids())
    assert balancer.update()["max_violation_max"] > 0
    assert torch.equal(biases(model), before)


def test_a_model_in_bfloat16_keeps_a_float32_bias(model: Any) -> None:
    half = model.to(torch.bfloat16)
    balancer = ExpertBalancer.attach(half, rate=0.001)
    train_on(half, random_ids())
    balancer.update()
    assert biases(half).dtype == torch.float32
    assert biases(half).abs().max() > 0
    assert "model.layers.0.mlp.gate.e_score_correction_bias" in half.state_dict()


def test_a_dense_model_has_nothing_to_balance(tokenizer: Any) -> None:
    dense = build_model(ModelConfig(num_layers=1), tokenizer, max_positions=64, seed=0).train()
    balancer = ExpertBalancer.attach(dense, rate=0.001)
    train_on(dense, random_ids())
    assert balancer.update() == {}
    assert balancer.relative_load == []


def test_a_rate_below_0_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"rate must be 0 or more, not -0\.1"):
        ExpertBalancer.attach(model, rate=-0.1)


def test_a_wrapper_does_not_hide_the_model(model: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

    balancer = ExpertBalancer.attach(Wrapper(), rate=0.01)
    train_on(model, random_ids())
    assert balancer.update()["max_violation_max"] > 0


def test_two_sharded_ranks_balance_as_one_process() -> None:
    """FSDP2 on two processes: parameters are sharded, each rank sees half of the batch, the biases are those of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.two_ranks"],
            env={
                **environment(),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "same biases" in output


# what it is for


def skewed_batches(num_steps: int) -> Iterator[Tensor]:
    """Words of four tokens drawn by Zipf's law: the tokens of the frequent ones crowd on a few experts."""
    words = torch.randint(3, 250, (40, 4), generator=torch_generator(0, "words"))
    frequency = 1 / torch.arange(1, 41)
    generator = torch_generator(0, "text")
    for _ in range(num_steps):
        drawn = torch.multinomial(frequency.expand(8, -1), 24, replacement=True, generator=generator)
        yield words[drawn].flatten(1)


def violations(tokenizer: Any, rate: float, num_steps: int) -> tuple[list[float], list[float]]:
    """Mean violation and loss of each step of a small training run."""
    model = build_model(SMALL_MIXTURE, tokenizer, max_positions=64, seed=1).train()
    balancer = ExpertBalancer.attach(model, rate=rate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found, losses = [], []
    for ids in skewed_batches(num_steps):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        loss = nn.functional.cross_entropy(
            (hidden @ head_weight(model).T).flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(balancer.update()["max_violation_mean"])
        losses.append(loss.item())
    return found, losses


def test_the_bias_evens_the_load_while_the_model_learns(tokenizer: Any) -> None:
    # ten times the default rate, for as much fewer steps
    balanced, losses = violations(tokenizer, 0.01, 100)
    unbalanced, losses_without = violations(tokenizer, 0.0, 100)
    assert balanced[0] == unbalanced[0] > 1.0
    assert max(balanced[-20:]) < 0.5
    assert min(unbalanced[-20:]) > 1.0
    # the model learns as well with the bias as without, up to what two short runs of one seed differ
    assert losses[-1] < 0.4 * losses[0]
    assert losses[-1] < 1.1 * losses_without[-1]
