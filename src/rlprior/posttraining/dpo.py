"""Direct preference optimization: TRL's DPOTrainer on correct against wrong answers of the model's own, or of a store of samples.

The reference is the model that the run starts from. Without a store the run draws and grades its answers itself, into
`samples/answers.jsonl`, exactly as an evaluation does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.posttraining.config import DPOConfig
from rlprior.posttraining.pairs import Pair, PairCounts, encode_pairs, make_pairs, read_graded, write_pairs
from rlprior.runs.folder import Run
from rlprior.sampling.answers import answer_problems
from rlprior.tasks.config import data_folder, load_task
from rlprior.tasks.problem import Problem
from rlprior.tasks.verifier import open_verifier

CODE = (
    "rlprior.posttraining",
    "rlprior.data.tokenizer",
    "rlprior.tasks",
    "rlprior.sampling",
    "rlprior.statistics",
    "rlprior.objectives",
    "rlprior.models",
    "rlprior.training.checkpoint",
    "rlprior.training.schedule",
    "rlprior.training.update",
    "rlprior.seeding",
)


@dataclass(frozen=True, kw_only=True)
class DPORunConfig:
    """A run of direct preference optimization.

    Args:
        dpo: what it does.
        init_from: Hugging Face folder of the model to start from, which is the reference too.
        samples: store of graded samples to make the pairs from; left out, the run draws them from the model.
        seed: of answers, pairs and their order.
        data_dir: folder that the task's relative paths start from.
    """

    dpo: DPOConfig
    init_from: str
    samples: str | None = None
    seed: int = 0
    data_dir: str | None = None


def run(config: DPORunConfig, run: Run) -> Path:
    """Draw answers where no store is given, pair them, and train. Returns the folder of the last checkpoint.

    Raises:
        RunError: no prompt has both a correct answer and one to reject.
        RunStopped: SIGTERM came; the step in progress has been finished and saved.
    """
    if run.result is not None:
        return run.directory / run.result["checkpoint"]
    from rlprior.posttraining.trainer import train

    examples, counts = _load_examples(config, run)
    longest = max(
        len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))
        for example in examples
    )
    return train(
        partial(make_trainer, config, longest, run),
        examples,
        config.dpo,
        run,
        init_from=Path(config.init_from),
        max_positions=longest,
        seed=config.seed,
        result=dataclasses.asdict(counts),
    )


def _load_examples(config: DPORunConfig, run: Run) -> tuple[list[dict[str, list[int]]], PairCounts]:
    """The pairs as token ids, and what became of the prompts; which pairs they are is written beside the run's other files."""
    dpo = config.dpo
    tokenizer = load_tokenizer(Path(config.init_from))
    problems = load_task(
        dpo.task,
        split=dpo.split,
        num_problems=dpo.num_problems,
        seed=dpo.task_seed,
        data_dir=data_folder(config.data_dir),
    )
    path = Path(config.samples) if config.samples else draw_answers(config, run, tokenizer, problems)
    samples, grades = read_graded(path)
    pairs, counts = make_pairs(
        samples,
        grades,
        rejected=dpo.rejected,
        max_pairs_per_prompt=dpo.max_pairs_per_prompt,
        seed=config.seed,
    )
    if not pairs:
        raise RunError(f"{path}: no pair can be made: {counts}; {_advice(counts)}")
    prompt_ids = {problem.id: encode_prompt(tokenizer, problem.prompt) for problem in problems}
    if config.samples:
        _check_tokens(path, pairs, tokenizer)
    examples = encode_pairs(pairs, prompt_ids, where=str(path))
    write_pairs(run.directory / "pairs.jsonl", pairs)
    return examples, counts


def _check_tokens(path: Path, pairs: Sequence[Pair], tokenizer: Any) -> None:
    """UsageError where a store's token ids are not this tokenizer's."""
    for sample in {one for pair in pairs for one in (pair.chosen, pair.rejected)}:
        if tokenizer.decode(sample.token_ids, skip_special_tokens=True) != sample.text:
            raise UsageError(
                f"{path}: the tokens of problem {sample.problem_id}, sample {sample.sample_index}, are not its text in the model's "
                "tokenizer; give samples of a model with the same tokenizer"
            )


def draw_answers(config: DPORunConfig, run: Run, tokenizer: Any, problems: list[Problem]) -> Path:
    """Draw and grade `samples_per_problem` answers of each problem, as far as they are missing. Returns the store."""
    dpo, path = config.dpo, run.directory / "samples" / "answers.jsonl"
    longest = max(len(encode_prompt(tokenizer, problem.prompt)) for problem in problems)
    model: Any = load_model(Path(config.init_from), max_positions=longest + dpo.decoding.max_new_tokens)
    total, done = len(problems) * dpo.samples_per_problem, 0

    def progress(num_answers: int) -> None:
        nonlocal done
        done += num_answers
        run.progress(done, total, unit="answers", note="drawing")

    data_dir = data_folder(config.data_dir)
    with open_verifier(dpo.task, data_dir) as verifier:
        answer_problems(
            model.to(run.world.device),
            tokenizer,
            problems,
            name="dpo",
            path=path,
            model_identity=run.identity.inputs.get("init_from", config.init_from),
            samples_per_problem=dpo.samples_per_problem,
            decoding=dpo.decoding,
            seed=config.seed,
            progress=progress,
            verifier=verifier,
        )
    return path


def make_trainer(
    config: DPORunConfig, max_positions: int, run: Run, model: Any, options: dict[str, Any], **arguments: Any
) -> Any:
    """A DPOTrainer whose reference is the model that the run started from, wherever it goes on."""
    from rlprior.posttraining.trainer import DPOTrainer, load_for_training, trl

    dpo = config.dpo
    loss = {"beta": dpo.beta, "loss_type": [dpo.loss_type], "label_smoothing": dpo.label_smoothing}
    return DPOTrainer(
        model=model,
        ref_model=load_for_training(Path(config.init_from), max_positions, run).requires_grad_(False),
        args=trl.DPOConfig(**options, **loss),
        **arguments,
    )


def _advice(counts: PairCounts) -> str:
    if counts.num_prompts_without_rejected == counts.num_prompts:
        return "take harder problems, or more of them"
    return "take easier problems, more answers (dpo.samples_per_problem), or more verdicts to reject (dpo.rejected)"


def describe_pairs(directory: Path) -> str:
    """The pairs of a finished run, in a line."""
    found = json.loads((directory / "result.json").read_text())
    names = [field.name for field in dataclasses.fields(PairCounts)]
    return f"pairs: {PairCounts(**{name: found[name] for name in names})}"
