"""Sharding, recomputation and precision change speed and memory, and nothing that is computed."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.small_study import Vocabulary, outcome, run_cli, torchrun, train_tables, write_toml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlprior.cli import main
from rlprior.config import UsageError, apply_overrides
from rlprior.data.packing import PackedBatch
from rlprior.models.causal_lm import build_model
from rlprior.models.presets import ModelConfig
from rlprior.objectives import RewardShaping
from rlprior.runs.files import read_jsonl
from rlprior.training import checkpoint as checkpoint_module
from rlprior.training import language_model
from rlprior.training.checkpoint import CheckpointSaver, last_good_checkpoint, restore_optimizer
from rlprior.training.engine import EngineConfig, LanguageModelLoss, prepare_model
from rlprior.training.update import OptimizerConfig, Updater
from rlprior.world import ALONE, World

SHAPING = RewardShaping(beta=-0.25, tail_reward=-0.1, top_k=5)


def small_model(**shape: Any) -> Any:
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    return build_model(ModelConfig(**{**sizes, **shape}), Vocabulary(32), max_positions=16, seed=0).train()


def small_batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (3, 17), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, 3:7] = -100
    documents = (torch.arange(16) > 9).long().expand(3, 16)
    positions = torch.arange(16) - 10 * documents
    return PackedBatch(ids[:, :-1], targets, positions, documents, torch.zeros(3, dtype=torch.long))


def loss_and_gradients(config: EngineConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module = prepare_model(small_model(), config, "auto", ALONE)
    loss, _ = module(small_batch(), SHAPING)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_bit(kind: Any) -> None:
    loss, gradients = loss_and_gradients(EngineConfig(activation_checkpointing=kind))
    expected_loss, expected = loss_and_gradients(EngineConfig())
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


class Executed(TorchDispatchMode):
    """Counts the operations that are computed: what a recomputation takes from its store does not come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def executed(kind: Any) -> Counter[str]:
    module = prepare_model(small_model(), EngineConfig(activation_checkpointing=kind), "auto", ALONE)
    with Executed() as operations:
        module(small_batch(), SHAPING)[0].backward()
    return Counter(operations.names)


def test_recomputation_runs_what_it_says_again() -> None:
    none, selective, full = (executed(kind) for kind in ("none", "selective", "full"))
    # A layer has seven matrix products, one attention and one activation function; the last product need not be made again.
    products = [
        counts["aten.mm.default"] + counts["mkldnn._linear_pointwise.default"]
        for counts in (none, selective, full)
    ]
    assert products[1] == products[0]
    assert 2 * 6 <= products[2] - products[0] <= 2 * 7
    attention = next(name for name in none if "attention" in name and "backward" not in name)
    assert (none[attention], selective[attention], full[attention]) == (2, 2, 4)
    assert (none["aten.silu.default"], selective["aten.silu.default"], full["aten.silu.default"]) == (2, 4, 4)


def test_bfloat16_multiplies_in_bfloat16_and_keeps_float32_weights() -> None:
    module = prepare_model(small_model(), EngineConfig(), "bfloat16", ALONE)
    seen: list[torch.dtype] = []
    module.model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    loss, _ = module(small_batch(), SHAPING)
    loss.backward()
    loss = loss.detach()
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    exact, gradients = loss_and_gradients(EngineConfig())
    assert loss.dtype == torch.float32
    # 8 bits of mantissa over two layers
    assert float(loss) == pytest.approx(float(exact), rel=0.02)
    assert float(loss) != float(exact)
    assert len(gradients) == len(list(module.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # the compiler's own
def test_compiled_layers_give_the_same_numbers(kind: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, gradients = loss_and_gradients(EngineConfig(compile=True, activation_checkpointing=kind))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    expected_loss, expected = loss_and_gradients(EngineConfig())
    # fused operations round elsewhere
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_compiled_layers_with_selective_recomputation_are_refused() -> None:
    with pytest.raises(ValueError, match="compile goes with activation_checkpointing 'none' or 'full'"):
        EngineConfig(compile=True, activation_checkpointing="selective")


@pytest.mark.parametrize("config", [EngineConfig(shard_size=2), EngineConfig(cpu_offload=True)])
def test_sharding_alone_is_refused(config: EngineConfig) -> None:
    with pytest.raises(UsageError, match="need several processes; start them with torchrun"):
        prepare_model(small_model(), config, "auto", ALONE)


def test_a_shard_size_that_does_not_divide_the_world_is_refused() -> None:
    with pytest.raises(UsageError, match=r"engine\.shard_size = 3 must divide the 4 processes"):
        prepare_model(small_model(), EngineConfig(shard_size=3), "auto", World(0, 4))


def test_a_model_without_layers_is_refused() -> None:
    class Recurrent(torch.nn.Module):
        @property
        def base_model(self) -> torch.nn.Module:
            return self

    with pytest.raises(UsageError, match="Recurrent has no list of layers"):
        prepare_model(Recurrent(), EngineConfig(compile=True), "auto", ALONE)


# Checkpoints


def trained(model: Any) -> Updater:
    updater = Updater(LanguageModelLoss(model), OptimizerConfig())
    for step in range(2):
        updater.model(small_batch(), SHAPING)[0].backward()
        updater.apply(1.0, 1e-3, step=step)
    return updater


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path / "tokenizer"


def make_saver(
    directory: Path, model: Any, updater: Updater, tokenizer: Path, **options: Any
) -> CheckpointSaver:
    return CheckpointSaver(
        directory,
        model=model,
        tokenizer_directory=tokenizer,
        optimizer=updater.optimizer,
        is_milestone=lambda step: False,
        **options,
    )


def test_a_large_optimizer_state_is_split_into_files(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    updater = trained(model)
    whole = make_saver(tmp_path / "whole", model, updater, tokenizer_directory).save(1, {})
    monkeypatch.setattr(checkpoint_module, "MAX_FILE_BYTES", 20_000)
    split = make_saver(tmp_path / "split", model, updater, tokenizer_directory).save(1, {})
    files = sorted(file for file in split.iterdir() if file.name.startswith("optimizer"))
    assert len(files) > 3
    assert files[0].name == f"optimizer-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 25_000 for file in files)
    merged = {key: value for file in files for key, value in load_file(file).items()}
    expected = load_file(whole / "optimizer.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    fresh = Updater(LanguageModelLoss(small_model()), OptimizerConfig())
    restore_optimizer(split, fresh.model.model, fresh.optimizer)
    for one, other in zip(fresh.model.parameters(), updater.model.parameters(), strict=True):
        assert torch.equal(fresh.optimizer.state[one]["exp_avg"], updater.optimizer.state[other]["exp_avg"])
    files[1].unlink()
    assert last_good_checkpoint(tmp_path / "split") is None


def test_a_checkpoint_in_the_background_holds_the_moment_of_its_step(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    updater = trained(model)
    expected = make_saver(tmp_path / "front", model, updater, tokenizer_directory).save(1, {})
    may_write = threading.Event()
    original = checkpoint_module.save_model

    def wait_and_save(*args: Any, **kwargs: Any) -> None:
        assert may_write.wait(60)
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint_module, "save_model", wait_and_save)
    saver = make_saver(tmp_path / "back", model, updater, tokenizer_directory, in_background=True)
    directory = saver.save(1, {})
    assert not directory.exists()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
            updater.optimizer.state[parameter]["exp_avg"].zero_()
    may_write.set()
    saver.finish()
    for file in expected.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_is_kept_of_a_tensor_that_one_process_has_whole_is_a_copy() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensor = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
        kept = checkpoint_module._whole(tensor, is_kept=True, copy=True)
        tensor.to_local().zero_()
        assert kept is not None
        assert kept.tolist() == [0, 1, 2, 3, 4, 5]
        restored = checkpoint_module._part_of(torch.ones(6), tensor)
        assert torch.equal(restored.full_tensor(), torch.ones(6))
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_is_there_once_its_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not only when the next one begins: a kill in between must not take it."""
    seen: dict[int, bool] = {}
    original = language_model.train_step
    checkpoints = tmp_path / "run" / "checkpoints"

    def look(*arguments: Any, **options: Any) -> Any:
        seen[options["step"]] = (checkpoints / "step-00000010").exists()
        if options["step"] > 10:
            time.sleep(0.05)  # for the thread
        return original(*arguments, **options)

    monkeypatch.setattr(language_model, "train_step", look)
    file = tiny_training(
        tmp_path,
        "training.engine.background_checkpoints=true",
        *("model.num_layers=1", "model.hidden_size=32", "training.save_every=10"),
    )
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 0
    assert not seen[10]
    assert seen[20]


def test_a_run_does_not_go_on_in_another_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_training(tmp_path, "model.num_layers=1", "model.hidden_size=32")
    train(1, file, tmp_path / "run")
    forget_second_half(tmp_path / "run", tmp_path / "half")
    monkeypatch.setattr(language_model, "resolve_precision", lambda *_: "bfloat16")
    assert main(["train", str(file), "--out", str(tmp_path / "half")]) == 2
    assert not (tmp_path / "half" / "result.json").exists()


# Processes. `train` is the command line, as a user has it.


def train(num_processes: int, file: Path, out: Path) -> None:
    arguments = ["train", file, "--out", out]
    done = run_cli(*arguments) if num_processes == 1 else torchrun(num_processes, *arguments)
    assert done.returncode == 0, done.stderr


def tiny_training(directory: Path, *overrides: str, preset: str = "tiny") -> Path:
    """Twenty steps of a preset, saved after ten."""
    tables = train_tables(
        "training.num_steps=20",
        "training.batch_tokens=512",
        "training.save_every=10",
        "training.eval_every=0",
        "training.schedule.peak_learning_rate=1e-3",
    )
    tables["model"] = {"preset": preset}
    return write_toml(directory / "train.toml", apply_overrides(tables, overrides))


def forget_second_half(finished: Path, copy: Path) -> None:
    """The run as it was after step 10."""
    shutil.copytree(finished, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000020")


def assert_same_training(found: Path, expected: Path) -> None:
    """Losses within 1e-5 over all steps, and weights and moments as near as float32 sums in another order leave them."""
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (found, expected))
    assert len(ours) == len(theirs) == 20
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "cross_entropy_nats", "gradient_norm", "entropy_nats"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (name, one["step"])
        # whole tokens: a rounding that tips one to another expert would show in the loss as well
        assert one.get("max_violation_max") == other.get("max_violation_max")
    last = Path("checkpoints") / "step-00000020" / "model.safetensors"
    ours, theirs = load_file(found / last), load_file(expected / last)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Adam divides by the root of the second moment: where a gradient is near 0, its rounding is a step's size
        assert float((ours[name] - tensor).norm() / tensor.norm()) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_two_processes_train_as_one_and_go_on_with_what_they_left(tmp_path: Path, preset: str) -> None:
    file = tiny_training(tmp_path, preset=preset)
    train(1, file, tmp_path / "one")
    train(2, file, tmp_path / "two")
    assert_same_training(tmp_path / "two", tmp_path / "one")
    forget_second_half(tmp_path / "two", tmp_path / "two-two")
    train(2, file, tmp_path / "two-two")
    assert outcome(tmp_path / "two-two") == outcome(tmp_path / "two")
    forget_second_half(tmp_path / "two", tmp_path / "two-one")
    train(1, file, tmp_path / "two-one")
    assert_same_training(tmp_path / "two-one", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    ["{shard_size=2}", "{shard_size=1, activation_checkpointing='selective', background_checkpoints=true}"],
)
def test_four_processes_with_copies_train_as_one_and_go_on_with_what_fewer_left(
    tmp_path: Path, engine: str
) -> None:
    file = tiny_training(tmp_path, f"training.engine={engine}")
    alone = tiny_training(tmp_path / "alone")
    train(1, alone, tmp_path / "one")
    train(4, file, tmp_path / "four")
    assert_same_training(tmp_path / "four", tmp_path / "one")
    forget_second_half(tmp_path / "four", tmp_path / "four-two")
    train(2, file, tmp_path / "four-two")
    assert_same_training(tmp_path / "four-two", tmp_path / "one")
    forget_second_half(tmp_path / "four-two", tmp_path / "two-four")
    train(4, file, tmp_path / "two-four")
    assert_same_training(tmp_path / "two-four", tmp_path / "one")


@pytest.mark.slow
def test_mistakes_under_torchrun_are_one_line(tmp_path: Path) -> None:
    file = tiny_training(tmp_path, "training.batch_tokens=192")
    done = torchrun(2, "train", file, "--out", tmp_path / "odd")
    assert done.returncode != 0
    assert (
        "a batch of 3 rows (batch_tokens / sequence_length) cannot be shared out evenly among 2"
        in done.stderr
    )
    assert json.loads((tmp_path / "odd" / "manifest.json").read_text())["stage"] == "pretrain"
    assert done.stderr.count("Traceback") == 1, "torchrun has one of its own, about its children"
