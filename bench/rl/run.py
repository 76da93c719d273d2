"""A whole run of reinforcement learning, this project's against TRL's GRPOTrainer, in turn.

    python -m bench.rl.run --init-from MODEL            # MODEL: a mid-trained checkpoint of `rlprior demo`

The demo's task, batch, lengths and rate, from the same weights: as many prompts, samples, updates and the same rewards (graded by this
project's rules on both sides). TRL has no dynamic sampling, so ours is off. Both run as one process of two threads and as two
processes of one thread; a ratio is the better of ours over the better of theirs in one round. Times are those of whole processes, imports
included. Writes JSON with every measurement, the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("rlprior", "trl")
LAYOUTS = {"one process of two threads": (1, 2), "two processes of one thread": (2, 1)}
PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, MAX_NEW_TOKENS = 8, 16, 64
LEARNING_RATE, WARMUP_STEPS, NUM_PROBLEMS = 1e-4, 5, 4000
TASK = {"families": ["addition", "subtraction"], "difficulties": [2, 3]}


def main() -> None:
    """Measure both sides in all layouts, or be TRL's side of one (`--trl`)."""
    arguments = _parse()
    if arguments.trl:
        run_trl(arguments)
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(arguments.rounds):
        found: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
        for side in SIDES if number % 2 else reversed(SIDES):
            for layout in LAYOUTS:
                found[side][layout] = _measure(side, layout, arguments)
                print(f"round {number + 1}: {side}, {layout}: {found[side][layout]}", flush=True)
        rounds.append(found)
    best = {side: [min(one["seconds"] for one in found[side].values()) for found in rounds] for side in SIDES}
    ratios = [ours / theirs for ours, theirs in zip(best["rlprior"], best["trl"], strict=True)]
    from rlprior.runs.provenance import provenance

    report = {
        "command": "python -m bench.rl.run "
        + " ".join(sys.argv[1:]).replace(str(arguments.init_from), arguments.init_from.name),
        **provenance(),
        "steps": arguments.steps,
        "samples": arguments.steps * PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
        "time_ratio": {
            "lowest": min(ratios),
            "median": statistics.median(ratios),
            "highest": max(ratios),
            "of_each_round": ratios,
        },
        "rounds": rounds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{statistics.median(ratios):.2f}x of TRL's time ({min(ratios):.2f}-{max(ratios):.2f}); {arguments.out}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init-from", type=Path, required=True, help="Hugging Face folder of the policy")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side and layout")
    parser.add_argument("--steps", type=int, default=50, help="updates of a run")
    parser.add_argument("--out", type=Path, default=Path("bench/results/rl-cpu.json"))
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(side: str, layout: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the whole run, of its loop alone, and the rewards of its first and last ten steps."""
    num_processes, num_threads = LAYOUTS[layout]
    launch = [sys.executable]
    if num_processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        if side == "trl":
            command = ["-m", "bench.rl.run", "--init-from", str(arguments.init_from)]
            command += ["--steps", str(arguments.steps), "--trl", str(directory / "trl.json")]
        else:
            file = _write_config(directory, arguments.steps)
            command = ["-m", "rlprior", "rl", str(file), "--init-from", str(arguments.init_from)]
            command += ["--out", str(directory / "run")]
        clock = time.perf_counter()
        done = subprocess.run(
            [*launch, *command],
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - clock
        if done.returncode:
            raise SystemExit(done.stderr)
        if side == "trl":
            return {"seconds": seconds, **json.loads((directory / "trl.json").read_text())}
        records, timings = (
            [json.loads(line) for line in (directory / "run" / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "timing.jsonl")
        )
        lengths = [record["response_tokens_mean"] for record in records]
        return {
            "seconds": seconds,
            "loop_seconds": sum(record["step_seconds"] for record in timings),
            **_summary([record["reward_mean"] for record in records], lengths),
        }


def _summary(rewards: list[float], lengths: list[float]) -> dict[str, float]:
    return {
        "reward_of_the_first_ten_steps": statistics.fmean(rewards[:10]),
        "reward_of_the_last_ten_steps": statistics.fmean(rewards[-10:]),
        "response_tokens_mean": statistics.fmean(lengths),
    }


def _write_config(directory: Path, num_steps: int) -> Path:
    import tomli_w

    rl = {
        "task": TASK,
        "num_problems": NUM_PROBLEMS,
        "num_steps": num_steps,
        "prompts_per_step": PROMPTS_PER_STEP,
        "samples_per_prompt": SAMPLES_PER_PROMPT,
        "length_schedule": [{"max_new_tokens": MAX_NEW_TOKENS}],
        "dynamic_sampling": "off",
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP_STEPS,
        "micro_batch_rows": 32,
        "save_every": num_steps,
    }
    file = directory / "rl.toml"
    file.write_text(tomli_w.dumps({"rl": rl}))
    return file


def run_trl(arguments: argparse.Namespace) -> None:
    """The same run by TRL's trainer, in this process or one of those that torchrun started."""
    import datasets
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlprior.data.tokenizer import encode_prompt
    from rlprior.models.causal_lm import load_model, load_tokenizer
    from rlprior.tasks.config import TaskConfig, load_task
    from rlprior.tasks.problem import Status
    from rlprior.tasks.verify import verify

    tokenizer = load_tokenizer(arguments.init_from)
    task = TaskConfig(families=tuple(TASK["families"]), difficulties=tuple(TASK["difficulties"]))
    problems = load_task(task, split="train", num_problems=NUM_PROBLEMS, seed=0, data_dir=None)
    by_prompt = {problem.prompt: problem for problem in problems}

    class Trainer(GRPOTrainer):
        """Prompts begin with the token that documents begin with, as in training."""

        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [encode_prompt(tokenizer, prompt) for prompt in prompts], None, {}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        return [float(verify(by_prompt[prompt], text).status is Status.CORRECT) for prompt, text in pairs]

    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS_PER_STEP * SAMPLES_PER_PROMPT // num_processes,
            num_generations=SAMPLES_PER_PROMPT,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=arguments.steps,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP_STEPS,
            lr_scheduler_type="constant_with_warmup",
            adam_beta2=0.95,
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.28,
            loss_type="dapo",
            temperature=1.0,
            top_k=0,
            logging_steps=1,
        )
        trainer = Trainer(
            model=load_model(arguments.init_from),
            reward_funcs=reward,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": list(by_prompt)}),
            processing_class=tokenizer,
        )
        result = trainer.train()
    if trainer.is_world_process_zero():
        steps = [record for record in trainer.state.log_history if "reward" in record]
        record = {
            "loop_seconds": result.metrics["train_runtime"],
            **_summary(
                [step["reward"] for step in steps], [step["completions/mean_length"] for step in steps]
            ),
        }
        arguments.trl.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
