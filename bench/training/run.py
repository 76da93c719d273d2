"""Training throughput and peak memory, this project's training step against Hugging Face's Trainer, in turn.

    python -m bench.training.run                        # tiny and 20m on a CPU, about a quarter of an hour
    python -m bench.training.run --presets tiny --rounds 3 --steps 20

Both train the same model from the same weights on the same packed rows, with the same attention mask, optimizer, clipping, threads and
micro-batch, and save and log nothing. Each measurement is a process of its own; the two take turns, and ratios are those of
neighbours. Writes JSON with every measurement, the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("rlprior", "trainer")
NUM_WARMUP_STEPS = 3


@dataclass(frozen=True)
class Case:
    """What is trained: rows of `sequence_length` tokens, `num_rows` of them a step, in micro-batches of `micro_batch_rows`."""

    preset: str
    vocab_size: int
    sequence_length: int
    num_rows: int
    micro_batch_rows: int


CASES = {
    "tiny": Case("tiny", 4096, 256, 16, 16),
    "20m": Case("20m", 8192, 512, 4, 4),
}


def main() -> None:
    """Measure the cases, or one side of one (`--side`), and write or print what came out."""
    arguments = _parse()
    if arguments.side:
        print(json.dumps(measure(arguments.side, CASES[arguments.presets[0]], arguments)))
        return
    with tempfile.TemporaryDirectory() as directory:
        arguments.corpus = directory
        results = {name: _compare(name, arguments) for name in arguments.presets}
    from rlprior.runs.provenance import provenance

    report = {
        "command": "python -m bench.training.run " + " ".join(sys.argv[1:]),
        **provenance(),
        "threads": arguments.threads,
        "steps": arguments.steps,
        "cases": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, result in results.items():
        low, middle, high = (result["speed_ratio"][key] for key in ("lowest", "median", "highest"))
        print(
            f"{name}: {result['rlprior']['median_tokens_per_second']:,.0f} tokens/s, "
            f"{middle:.2f}x of Trainer's ({low:.2f}-{high:.2f}); peak memory {result['memory_ratio']:.2f}x of Trainer's"
        )
    print(f"written: {arguments.out}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/training-cpu.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    _prepare_corpus(Path(arguments.corpus) / name, case)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            found[side].append(_measure_apart(side, name, arguments))
            print(f"{name}, round {number + 1} of {arguments.rounds}: {side} {found[side][-1]}", flush=True)
    losses = {side: {round(one["loss"], 4) for one in found[side]} for side in SIDES}
    ratios = [
        ours["tokens_per_second"] / theirs["tokens_per_second"]
        for ours, theirs in zip(found["rlprior"], found["trainer"], strict=True)
    ]
    medians = {side: statistics.median(one["tokens_per_second"] for one in found[side]) for side in SIDES}
    peaks = {side: statistics.median(one["peak_bytes"] for one in found[side]) for side in SIDES}
    return {
        "case": vars(case),
        **{
            side: {
                "median_tokens_per_second": medians[side],
                "peak_bytes": peaks[side],
                "loss_of_the_last_step": sorted(losses[side]),
                "measurements": found[side],
            }
            for side in SIDES
        },
        "speed_ratio": {
            "lowest": min(ratios),
            "median": statistics.median(ratios),
            "highest": max(ratios),
            "of_each_round": ratios,
        },
        "memory_ratio": peaks["rlprior"] / peaks["trainer"],
    }


def _measure_apart(side: str, name: str, arguments: argparse.Namespace) -> dict[str, float]:
    options = ["--side", side, "--presets", name, "--corpus", str(Path(arguments.corpus) / name)]
    options += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.training.run", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _prepare_corpus(directory: Path, case: Case) -> None:
    from rlprior.data.config import DataConfig, SourceConfig, TokenizerConfig
    from rlprior.data.prepare import prepare

    source = SourceConfig(name="code", kind="embedded_code", max_bytes=4_000_000)
    tokenizer = TokenizerConfig(vocab_size=case.vocab_size, max_training_bytes=2_000_000)
    prepare(DataConfig(sources=(source,), tokenizer=tokenizer), directory)


def measure(side: str, case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second over the timed steps, peak resident memory, and the loss of the last step, which the sides share."""
    import torch

    from rlprior.data.packing import Corpus, PackedMixture
    from rlprior.models.causal_lm import build_model, load_tokenizer
    from rlprior.models.presets import ModelConfig

    torch.set_num_threads(arguments.threads)
    corpus = Corpus.open(Path(arguments.corpus))
    mixture = PackedMixture(corpus, {"code": 1}, case.sequence_length, seed=0)
    model = build_model(
        ModelConfig(preset=case.preset),
        load_tokenizer(corpus.tokenizer_directory),
        max_positions=case.sequence_length,
        seed=0,
    ).train()
    train = train_with_rlprior if side == "rlprior" else train_with_trainer
    moments, loss = train(model, mixture, case, arguments.steps + NUM_WARMUP_STEPS)
    seconds = moments[-1] - moments[NUM_WARMUP_STEPS - 1]
    num_tokens = arguments.steps * case.num_rows * case.sequence_length
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"tokens_per_second": num_tokens / seconds, "peak_bytes": peak, "loss": loss}


RATE = 1e-3


def train_with_rlprior(model: Any, mixture: Any, case: Case, num_steps: int) -> tuple[list[float], float]:
    """The moments at which steps ended, and the last step's loss."""
    from rlprior.training.engine import EngineConfig, prepare_model
    from rlprior.training.language_model import TrainingConfig, train_step
    from rlprior.training.update import OptimizerConfig, Updater
    from rlprior.world import ALONE

    training = TrainingConfig(
        mixture={"code": 1},
        num_steps=num_steps,
        batch_tokens=case.num_rows * case.sequence_length,
        sequence_length=case.sequence_length,
        micro_batch_tokens=case.micro_batch_rows * case.sequence_length,
    )
    module = prepare_model(model, EngineConfig(), "auto", ALONE)
    updater = Updater(module, OptimizerConfig())
    moments: list[float] = []
    measured: dict[str, float] = {}
    for step in range(1, num_steps + 1):
        batch = mixture.batch((step - 1) * case.num_rows, case.num_rows)
        measured = train_step(
            module, updater, batch, training, rate=RATE, step=step, seed=0, with_metrics=False
        )
        moments.append(time.perf_counter())
    return moments, measured["loss"]


def train_with_trainer(model: Any, mixture: Any, case: Case, num_steps: int) -> tuple[list[float], float]:
    """The same by `transformers.Trainer`, whose model computes its own loss."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from rlprior.data.packing import attention_mask
    from rlprior.training.update import OptimizerConfig

    moments: list[float] = []
    optimizer = OptimizerConfig()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return num_steps * case.num_rows

        def __getitem__(self, row: int) -> Any:
            return mixture.batch(row, 1)

    def collate(rows: list[Any]) -> dict[str, Any]:
        def join(name: str) -> Any:
            return torch.cat([getattr(row, name) for row in rows])

        targets = join("targets")
        return {
            "input_ids": join("input_ids"),
            "position_ids": join("position_ids"),
            "attention_mask": attention_mask(join("document_ids")),
            "labels": targets,
            "shift_labels": targets,  # aligned already: the model shifts nothing
        }

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    class Recorded(Trainer):
        last_loss = float("nan")

        def training_step(self, *inputs: Any, **options: Any) -> Any:
            loss = super().training_step(*inputs, **options)
            self.last_loss = float(loss) * self.args.gradient_accumulation_steps
            return loss

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=num_steps,
        per_device_train_batch_size=case.micro_batch_rows,
        gradient_accumulation_steps=case.num_rows // case.micro_batch_rows,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_gradient_norm,
        optim="adamw_torch_fused",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Recorded(
        model=model, args=settings, train_dataset=Rows(), data_collator=collate, callbacks=[Clock()]
    )
    trainer.train()
    return moments, trainer.last_loss


if __name__ == "__main__":
    main()
