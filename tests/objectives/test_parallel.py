"""A vocabulary over 1, 2 and 4 processes gives what one process gives; and a head that FSDP shards."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.objectives.conftest import CASES, Inputs, make_inputs
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from rlprior.objectives import (
    CrossEntropy,
    Objective,
    RewardShaping,
    SampledReward,
    VocabularyShard,
    chunk_sizes,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)

NUM_PROCESSES = 4
SHAPING = RewardShaping(beta=-0.25, head_reward=0.2, tail_reward=-0.1, top_k=5)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; the weight's rows beyond `vocab_size` are padding."""

    objective: Objective
    inputs: Inputs
    vocab_size: int
    options: dict[str, Any]
    from_logits: bool = False
    frozen: str = ""
    block_elements: int = chunk_sizes.CPU_BLOCK_ELEMENTS


def make_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, family in CASES.items():
        for index, objective in enumerate(family):
            if not isinstance(objective, SampledReward):
                cases[f"{name}-{index}"] = Case(objective, make_inputs(), 37, {"reduction": "mean"})
    options = {"logit_softcap": 5.0, "z_loss": 0.01, "reduction": "none", "chunk_rows": 4}
    cases["options"] = Case(SHAPING, make_inputs(seed=1), 37, options)
    # 10 columns in 4 rows or 7 columns in 5: processes that went by their own columns would not meet.
    cases["many-chunks"] = Case(SHAPING, make_inputs(seed=1), 37, {"reduction": "sum"}, block_elements=40)
    cases["none"] = Case(SHAPING, make_inputs(seed=2), 37, {"reduction": "none"})
    cases["logits"] = Case(SHAPING, make_inputs(seed=3), 37, {"reduction": "sum"}, from_logits=True)
    padded = make_inputs(seed=4, v=40)
    padded.weight[37:] = 1e3
    padded.targets.clamp_(max=36)
    cases["padded"] = Case(SHAPING, padded, 37, {"reduction": "sum"})
    cases["padded-logits"] = Case(SHAPING, padded, 37, {"reduction": "sum"}, from_logits=True)
    small = make_inputs(seed=5, v=12)
    small.targets.clamp_(max=8)
    cases["nothing-but-padding"] = Case(SHAPING, small, 9, {"reduction": "sum"})
    cases["head-of-all"] = Case(
        RewardShaping(head_reward=0.2, tail_reward=-0.2), small, 9, {"reduction": "sum"}
    )
    tied = make_inputs(seed=6)
    for tensor in (tied.hidden, tied.weight):
        tensor.round_()  # products of small integers are exact: tokens of different processes tie in many rows
    cases["tied"] = Case(SHAPING, tied, 37, {"reduction": "sum"})
    cases["frozen-hidden"] = Case(SHAPING, make_inputs(seed=7), 37, {"reduction": "mean"}, frozen="hidden")
    cases["frozen-weight"] = Case(SHAPING, make_inputs(seed=8), 37, {"reduction": "mean"}, frozen="weight")
    return cases


def run_case(case: Case, part: slice, shard: VocabularyShard | None) -> dict[str, Tensor | None]:
    """Loss, gradients and metrics of a process that holds this part of the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_sizes, "CPU_CHUNK_ROWS", 1)
        patch.setattr(chunk_sizes, "CPU_BLOCK_ELEMENTS", case.block_elements)
        return run_whole_case(case, part, shard)


def run_whole_case(case: Case, part: slice, shard: VocabularyShard | None) -> dict[str, Tensor | None]:
    inputs = case.inputs
    hidden = inputs.hidden.clone().requires_grad_(case.frozen != "hidden")
    weight = inputs.weight[part].clone().requires_grad_(case.frozen != "weight")
    arguments = (inputs.targets, case.objective, inputs.token_weights)
    options = {**case.options, "return_metrics": True, "shard": shard}
    if case.from_logits:
        logits = (inputs.hidden @ inputs.weight.T)[:, part].clone().requires_grad_()
        loss, metrics = shaped_cross_entropy(logits, *arguments, **options)
        loss.sum().backward()
        gradients = {"weight": logits.grad.T}
    else:
        loss, metrics = linear_shaped_cross_entropy(hidden, weight, *arguments, **options)
        (loss * torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
        gradients = {"hidden": hidden.grad, "weight": weight.grad}
    return {"loss": loss.detach(), **gradients, **{f"metric {k}": v for k, v in vars(metrics).items()}}


def expected_of(case: Case) -> dict[str, Tensor | None]:
    """The same from one process without padding; padding gets a gradient of 0."""
    found = run_case(case, slice(0, case.vocab_size), None)
    if found["weight"] is not None:
        padding = case.inputs.weight.shape[0] - case.vocab_size
        found["weight"] = nn.functional.pad(found["weight"], (0, 0, 0, padding))
    return found


def own_part(num_rows: int, rank: int, world_size: int) -> slice:
    rows = torch.arange(num_rows).chunk(world_size)[rank]  # the last process may hold fewer
    return slice(int(rows[0]), int(rows[-1]) + 1)


class HeadInside(nn.Module):
    """A model whose forward ends in the loss, so that FSDP gathers its head for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 37, bias=False, dtype=torch.float64)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(features))
        return linear_shaped_cross_entropy(hidden, self.head.weight, targets, SHAPING, reduction="sum")


def fsdp_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    return features, torch.randint(37, (8,), generator=generator)


def run_fsdp(rank: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    model = fully_shard(HeadInside(), mesh=mesh)
    features, targets = (tensor.chunk(NUM_PROCESSES)[rank] for tensor in fsdp_batch())
    (model(features, targets) * NUM_PROCESSES).backward()  # FSDP averages over the processes
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def run_dtensor(rank: int) -> dict[str, dict[str, Tensor]]:
    """Losses and whole gradients of inputs that are DTensors, alone and together."""
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    inputs, shard = make_inputs(seed=9), VocabularyShard(mesh.get_group())
    found: dict[str, dict[str, Tensor]] = {}

    def record(name: str, loss: Tensor, **leaves: Tensor) -> None:
        loss.backward()
        assert type(loss) is Tensor
        assert all(type(leaf.grad) is type(leaf) for leaf in leaves.values())
        whole = {
            key: leaf.grad.full_tensor() if isinstance(leaf, DTensor) else leaf.grad
            for key, leaf in leaves.items()
        }
        found[name] = {"loss": loss.detach(), **whole}

    def split(tensor: Tensor, *placements: Any) -> Any:
        return distribute_tensor(tensor.clone(), mesh, placements).detach().requires_grad_()

    for name, hidden in (
        ("weight", inputs.hidden.clone().requires_grad_()),
        ("both", split(inputs.hidden, Replicate())),
    ):
        weight = split(inputs.weight, Shard(0))
        loss = linear_shaped_cross_entropy(hidden, weight, inputs.targets, SHAPING, shard=shard)
        record(name, loss, hidden=hidden, weight=weight)
    targets = distribute_tensor(inputs.targets, mesh, [Replicate()])
    for name, placement, options in (
        ("logits", Shard(1), {"shard": shard}),
        ("whole logits", Replicate(), {}),
    ):
        logits = split(inputs.hidden @ inputs.weight.T, placement)
        record(name, shaped_cross_entropy(logits, targets, SHAPING, **options), logits=logits)
    hidden, weight = split(inputs.hidden, Replicate()), inputs.weight.clone().requires_grad_()
    loss = linear_shaped_cross_entropy(hidden, weight, inputs.targets, SHAPING)
    record("hidden", loss, hidden=hidden, weight=weight)
    few = split(inputs.weight[: NUM_PROCESSES - 1], Shard(0))  # the last process holds none
    hidden = inputs.hidden.clone().requires_grad_()
    targets = inputs.targets.clamp(max=NUM_PROCESSES - 2)
    record(
        "few rows",
        linear_shaped_cross_entropy(hidden, few, targets, SHAPING, shard=shard),
        hidden=hidden,
        weight=few,
    )
    return found


def refused_calls(rank: int) -> dict[str, Callable[[], Tensor]]:
    """Calls that raise on every process alike; each must come back, and the collectives after it still work."""
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    pairs = init_device_mesh("cpu", (NUM_PROCESSES // 2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    inputs, shard = make_inputs(seed=9), VocabularyShard(mesh.get_group())
    part = inputs.weight[own_part(37, rank, NUM_PROCESSES)]
    is_last = rank == NUM_PROCESSES - 1

    def linear(hidden: Tensor = inputs.hidden, weight: Tensor = part, **changes: Any) -> Tensor:
        arguments = {"targets": inputs.targets, "shaping": SHAPING, "shard": shard, **changes}
        return linear_shaped_cross_entropy(hidden, weight, **arguments)

    def split(tensor: Tensor, placement: Any, over: Any = mesh) -> Any:
        return distribute_tensor(tensor, over, [placement])

    ignored = torch.full_like(inputs.targets, -100) if is_last else inputs.targets
    other = inputs.targets.flip(0) if is_last else inputs.targets
    return {
        "weight without a shard": lambda: linear(weight=split(inputs.weight, Shard(0)), shard=None),
        "replicated weight": lambda: linear(weight=split(inputs.weight, Replicate())),
        "weight over other processes": lambda: linear(weight=split(inputs.weight, Shard(0), pairs)),
        "split hidden": lambda: linear(hidden=split(inputs.hidden, Shard(0))),
        "logits without a shard": lambda: shaped_cross_entropy(
            split(inputs.logits, Shard(1)), inputs.targets, SHAPING
        ),
        "split positions": lambda: shaped_cross_entropy(
            split(inputs.logits, Shard(0)), inputs.targets, SHAPING, shard=shard
        ),
        "all ignored on one rank": lambda: linear(targets=ignored),
        "other targets on one rank": lambda: linear(targets=other),
        "another number of positions": lambda: linear(
            hidden=inputs.hidden[: 23 - is_last], targets=inputs.targets[: 23 - is_last]
        ),
        "gradient on one rank": lambda: linear(hidden=inputs.hidden.clone().requires_grad_(is_last)),
        "no tokens at all": lambda: linear(weight=part[:0]),
    }


REFUSALS = {
    "weight without a shard": "with FSDP, call the loss inside the forward",
    "replicated weight": r"weight must be sharded along its vocabulary alone, \[Shard\(0\)\], got",
    "weight over other processes": r"over the ranks \[\d, \d\] and the shard's group has \[0, 1, 2, 3\]; pass shard=",
    "split hidden": "hidden is a DTensor with placements .* redistribute",
    "logits without a shard": "logits is a DTensor with placements .* pass shard=",
    "split positions": r"logits must be sharded along its vocabulary alone, \[Shard\(1\)\], got",
    "all ignored on one rank": r"differ in .*targets that count \[20, 20, 20, 0\]",
    "other targets on one rank": r"differ in \(rank by rank\) sum of target times place",
    "another number of positions": r"differ in .*positions \[23, 23, 23, 22\]",
    "gradient on one rank": r"differ in \(rank by rank\) whether hidden requires grad \[0, 0, 0, 1\]",
    "no tokens at all": r"vocab_size must be in \[1, 0\]",
}


def run_refused(rank: int) -> dict[str, str]:
    messages: dict[str, str] = {}
    for name, call in refused_calls(rank).items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
        distributed.barrier()
    return messages


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=datetime.timedelta(seconds=120),
    )
    found: dict[Any, Any] = {}
    for world_size in (1, 2, NUM_PROCESSES):
        group = distributed.new_group(range(world_size))
        if rank >= world_size:
            continue
        for name, case in make_cases().items():
            part = own_part(case.inputs.weight.shape[0], rank, world_size)
            shard = VocabularyShard(group, vocab_size=case.vocab_size)
            found[name, world_size] = run_case(case, part, shard)
    found["fsdp"], found["dtensor"], found["refused"] = run_fsdp(rank), run_dtensor(rank), run_refused(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=NUM_PROCESSES)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("world_size", [1, 2, NUM_PROCESSES])
@pytest.mark.parametrize("name", make_cases())
def test_any_number_of_processes_gives_the_same(
    bench: Any, found: list[dict[Any, Any]], name: str, world_size: int
) -> None:
    expected = expected_of(make_cases()[name])
    parts = [outcome[name, world_size] for outcome in found[:world_size]]
    for key, value in expected.items():
        if value is None:
            assert all(part[key] is None for part in parts), key
            continue
        if key == "weight":
            whole = torch.cat([part[key] for part in parts])
            bench.assert_close(whole, value, 1e-12, key)
            continue
        for part in parts:
            assert torch.equal(part[key].isnan(), value.isnan()), key
            bench.assert_close(part[key].nan_to_num(), value.nan_to_num(), 1e-12, key)


def test_a_head_that_fsdp_shards(bench: Any, found: list[dict[Any, Any]]) -> None:
    model = HeadInside()
    model(*fsdp_batch()).backward()
    for outcome in found:
        for name, parameter in model.named_parameters():
            bench.assert_close(outcome["fsdp"][name], parameter.grad, 1e-12, name)


@pytest.mark.parametrize("name", ["weight", "both", "hidden", "few rows"])
def test_dtensors_of_hidden_and_weight(bench: Any, found: list[dict[Any, Any]], name: str) -> None:
    inputs = make_inputs(seed=9)
    num_rows = NUM_PROCESSES - 1 if name == "few rows" else 37
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight[:num_rows].clone().requires_grad_()
    loss = linear_shaped_cross_entropy(hidden, weight, inputs.targets.clamp(max=num_rows - 1), SHAPING)
    loss.backward()
    expected = {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}
    for outcome in found:
        for key, value in expected.items():
            bench.assert_close(outcome["dtensor"][name][key], value, 1e-12, key)


@pytest.mark.parametrize("name", ["logits", "whole logits"])
def test_dtensors_of_logits(bench: Any, found: list[dict[Any, Any]], name: str) -> None:
    inputs = make_inputs(seed=9)
    logits = inputs.logits.requires_grad_()
    loss = shaped_cross_entropy(logits, inputs.targets, SHAPING)
    loss.backward()
    for outcome in found:
        bench.assert_close(outcome["dtensor"][name]["loss"], loss.detach(), 1e-12, "loss")
        bench.assert_close(outcome["dtensor"][name]["logits"], logits.grad, 1e-12, "gradient")


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_hang_or_be_wrong_is_refused_on_every_process(
    found: list[dict[Any, Any]], name: str
) -> None:
    for outcome in found:
        assert outcome["refused"].keys() == REFUSALS.keys()
        assert re.search(REFUSALS[name], outcome["refused"][name])


@pytest.fixture
def one_process(tmp_path: Path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda i: {"shaping": SampledReward(), "shard": VocabularyShard()},
            "SampledReward draws from the whole",
        ),
        (
            lambda i: {"implementation": "reference", "shard": VocabularyShard()},
            r"implementation must be one of \('auto', 'chunked'\) with a shard",
        ),
        (lambda i: {"shard": VocabularyShard(vocab_size=38)}, r"vocab_size must be in \[1, 37\].*got 38"),
        (lambda i: {"shard": VocabularyShard(vocab_size=30)}, r"targets must be in \[0, 30\)"),
    ],
)
def test_what_a_shard_cannot_do_is_refused(
    one_process: None, call: Callable[[Inputs], dict[str, Any]], message: str
) -> None:
    inputs = make_inputs()
    inputs.targets[0] = 36
    arguments = {"shaping": CrossEntropy(), **call(inputs)}
    with pytest.raises(ValueError, match=message):
        linear_shaped_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, **arguments)
