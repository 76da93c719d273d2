"""What a study consists of: every run with its identity, before anything is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlprior.data import prepare
from rlprior.data.config import DataConfig
from rlprior.evaluation import readiness, suite
from rlprior.evaluation import stage as evaluation_stage
from rlprior.models.presets import num_parameters, training_flops_per_token
from rlprior.posttraining import dpo, sft
from rlprior.rl import loop
from rlprior.rl.config import RLConfig
from rlprior.runs.identity import RunIdentity, identify, input_identity
from rlprior.sampling.engines import check_engine
from rlprior.study.config import StudyConfig
from rlprior.tasks.config import TaskConfig, data_folder
from rlprior.training import checkpoint, language_model
from rlprior.training.language_model import TrainingConfig

STAGES: dict[str, Any] = {
    "data": prepare,
    "pretrain": language_model,
    "midtrain": language_model,
    "rl": loop,
    "sft": sft,
    "dpo": dpo,
    "evaluate": evaluation_stage,
    "suite": suite,
    "readiness": readiness,
}
"""Stage -> module with `run(config, run)` and `CODE`, the modules that compute it."""

DISTRIBUTED_STAGES = {"pretrain", "midtrain", "rl"}
"""Stages that share their work among the processes of a world; the others are made by the first process alone."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a study.

    Args:
        stage: key of `STAGES`; an evaluation is 'evaluate'.
        label: what a reader calls it, for example 'midtrain tail s0'.
        config: the stage's run config; its paths point into `directory`'s siblings.
        identity: what determines it.
        directory: where it is written.
        needs: directories of the runs that have to be finished first.
        arm, seed, of_stage: place in the study ('' and -1 for data); `of_stage` is the stage that an evaluation measures.
        cost: rough FLOPs, to order the queue and to estimate the time.
    """

    stage: str
    label: str
    config: Any
    identity: RunIdentity
    directory: Path
    needs: tuple[Path, ...]
    arm: str = ""
    seed: int = -1
    of_stage: str = ""
    cost: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether its own result is on disk: a folder that holds the result of another run is not."""
        try:
            found = json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        return found["id"] == self.identity.id and (self.directory / "result.json").exists()


def plan_run(
    stage: str,
    config: Any,
    *,
    label: str,
    directory: Path | None = None,
    root: Path | None = None,
    inputs: Mapping[str, str] | None = None,
    **place: Any,
) -> PlannedRun:
    """A run in `directory`, or in a folder of `root` named by label and id."""
    identity = identify(stage, config, code=STAGES[stage].CODE, inputs=inputs)
    if directory is None:
        assert root is not None
        directory = root / f"{label.replace(' ', '-')}-{identity.id}"
    return PlannedRun(
        stage=stage,
        label=label,
        config=config,
        identity=identity,
        directory=directory,
        **{"needs": (), **place},
    )


def plan_study(config: StudyConfig, directory: Path) -> list[PlannedRun]:
    """Every run of the study, each after those that it needs. Identities follow from the inputs' identities: nothing has to exist.

    Raises:
        UsageError: a data file that the study names is not there, or its rollout engine is not installed.
    """
    check_engine(config.rl.rollout)
    root = directory / "runs"
    data = plan_data(config.data, root, config.data_dir)
    plan = [data]
    for seed in config.seeds:
        for arm in config.arms:
            plan += _plan_arm(config, root, data, arm, seed)
    return plan


def plan_data(data: DataConfig, root: Path, data_dir: str | None) -> PlannedRun:
    """The run that prepares a corpus, in a folder of `root`; `data_dir` is where its paths start unless it names its own."""
    data = replace(data, data_dir=data.data_dir or data_dir)
    inputs = {name: input_identity(path) for name, path in prepare.input_files(data).items()}
    return plan_run("data", data, label="data", root=root, inputs={"data_dir": "", **inputs})


def _plan_arm(config: StudyConfig, root: Path, data: PlannedRun, arm: str, seed: int) -> list[PlannedRun]:
    shape = config.model.shape
    vocab_size = config.data.tokenizer.vocab_size
    plan: list[PlannedRun] = []
    before: PlannedRun | None = None
    for name, training in (("pretrain", config.pretrain), ("midtrain", config.midtrain)):
        previous = before
        run_config = language_model.LanguageModelConfig(
            training=replace(training, objective=config.arms[arm].objective),
            corpus=str(data.directory),
            seed=seed,
            model=config.model,
            init_from=str(last_checkpoint(previous)) if previous else None,
        )
        before = plan_run(
            name,
            run_config,
            label=f"{name} {arm} s{seed}",
            root=root,
            inputs={"corpus": data.identity.id, "init_from": previous.identity.id if previous else ""},
            needs=((previous or data).directory,),
            arm=arm,
            seed=seed,
            cost=training.num_tokens * training_flops_per_token(shape, vocab_size, training.sequence_length),
        )
        plan += [before, _plan_evaluation(config, root, data, before, training)]
    assert before is not None
    rl_config = loop.RLRunConfig(
        rl=config.rl, init_from=str(last_checkpoint(before)), seed=seed, data_dir=config.data_dir
    )
    num_samples = config.rl.num_steps * config.rl.prompts_per_step * config.rl.samples_per_prompt
    rl = plan_run(
        "rl",
        rl_config,
        label=f"rl {arm} s{seed}",
        root=root,
        inputs={
            "init_from": before.identity.id,
            **task_inputs(config.data_dir, {"rl": config.rl.task}),
        },
        needs=(before.directory,),
        arm=arm,
        seed=seed,
        # sampling costs a third of a training pass; responses are taken to be 64 tokens, groups drawn twice
        cost=num_samples * 64 * 2.0 * training_flops_per_token(shape, vocab_size, 64),
    )
    return [*plan, rl, _plan_evaluation(config, root, data, rl, config.rl)]


def last_checkpoint(run: PlannedRun) -> Path:
    """Where a planned training run will leave its last checkpoint."""
    return checkpoint.checkpoint_directory(run.directory, run.config.training.num_steps)


def _plan_evaluation(
    config: StudyConfig,
    root: Path,
    data: PlannedRun,
    target: PlannedRun,
    stage: TrainingConfig | RLConfig,
) -> PlannedRun:
    milestones = [step for step in range(1, stage.num_steps + 1) if stage.is_milestone(step)]
    evaluation = config.evaluation
    run_config = evaluation_stage.EvaluationRunConfig(
        evaluation=evaluation,
        target=str(target.directory),
        steps=tuple(milestones),
        corpus=str(data.directory),
        stage=target.stage,
        window_tokens=config.midtrain.sequence_length,
        data_dir=config.data_dir,
    )
    tokens = evaluation.final.held_out_tokens + len(milestones) * evaluation.intermediate.held_out_tokens
    for budget, count in ((evaluation.final, 1), (evaluation.intermediate, len(milestones))):
        tokens += count * len(evaluation.tasks) * budget.num_problems * budget.samples_per_problem * 64
    flops = training_flops_per_token(config.model.shape, config.data.tokenizer.vocab_size, 64) / 3
    return plan_run(
        "evaluate",
        run_config,
        label=f"evaluate {target.label}",
        root=root,
        inputs={
            "target": target.identity.id,
            "corpus": data.identity.id,
            **task_inputs(config.data_dir, evaluation.tasks),
        },
        needs=(target.directory,),
        arm=target.arm,
        seed=target.seed,
        of_stage=target.stage,
        cost=tokens * flops,
    )


def task_inputs(data_dir: str | None, tasks: Mapping[str, TaskConfig]) -> dict[str, str]:
    """Identity of each task's files, and of the data folder itself, whose path does not matter.

    Raises:
        UsageError: a file is not there, or what a task's verifier needs.
    """
    root = data_folder(data_dir)
    for task in tasks.values():
        task.check_verifier(root)
    files = {
        f"task {name} {what}": path
        for name, task in tasks.items()
        for what, path in task.input_files(root).items()
    }
    return {"data_dir": "", **{name: input_identity(path) for name, path in files.items()}}


def describe_model(config: StudyConfig) -> dict[str, Any]:
    """Shape and size of the model, for the report."""
    shape = config.model.shape
    vocab_size = config.data.tokenizer.vocab_size
    return {
        "preset": config.model.preset,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": vocab_size,
        "num_parameters": num_parameters(shape, vocab_size),
    }
