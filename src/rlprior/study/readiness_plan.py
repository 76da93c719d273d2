"""Which runs measure which model: its own corpus and its readiness, in folders named by what determines them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlprior.config import UsageError
from rlprior.evaluation.judgement import check_group_size
from rlprior.evaluation.readiness import ReadinessRunConfig
from rlprior.models.causal_lm import require_model_folder
from rlprior.runs.identity import input_identity
from rlprior.study.config import EvaluateFile
from rlprior.study.plan import PlannedRun, plan_data, plan_run, task_inputs

_UNFIT_FOR_FOLDERS = re.compile(r"[^\w.]+")


def name_models(arguments: Sequence[str]) -> dict[str, Path]:
    """Folders by label: what stands before `=`, or else the folder's name, of a run's checkpoint the run's.

    >>> name_models(["runs/midtrain-ce-s0-0123456789ab/checkpoints/step-00000320", "b=models/b"])
    {'midtrain-ce-s0': PosixPath('runs/midtrain-ce-s0-0123456789ab/checkpoints/step-00000320'), 'b': PosixPath('models/b')}

    Raises:
        UsageError: two models have one label.
    """
    models: dict[str, Path] = {}
    for argument in arguments:
        label, equals, path = argument.partition("=")
        if not equals or "/" in label:
            label, path = "", argument
        folder = Path(path)
        if not label:
            place = folder.resolve()
            is_checkpoint = place.parent.name == "checkpoints"
            label = re.sub(r"-[0-9a-f]{12}$", "", (place.parents[1] if is_checkpoint else place).name)
        if label in models:
            raise UsageError(f"two models are called {label!r}; write LABEL={argument}")
        models[label] = folder
    return models


def plan_readiness(
    models: Mapping[str, Path], file: EvaluateFile, root: Path, *, group_size: int
) -> dict[str, list[PlannedRun]]:
    """For each model the runs that measure it: its corpus, tokenized by itself, and the measurements.

    Raises:
        UsageError: no model's folder, or a group that is larger than the pool of samples.
    """
    check_group_size(group_size, file.evaluation.final.samples_per_problem)
    plans: dict[str, list[PlannedRun]] = {}
    for label, folder in models.items():
        require_model_folder(folder)
        tokenizer = replace(file.data.tokenizer, path=str(folder.resolve()))
        data = plan_data(replace(file.data, tokenizer=tokenizer), root, file.data_dir)
        config = ReadinessRunConfig(
            evaluation=file.evaluation,
            target=str(folder.resolve()),
            corpus=str(data.directory),
            window_tokens=file.window_tokens,
            data_dir=file.data_dir,
        )
        inputs = {
            "target": input_identity(folder),
            "corpus": data.identity.id,
            **task_inputs(file.data_dir, file.evaluation.tasks),
        }
        run = plan_run(
            "readiness",
            config,
            label=f"readiness {_UNFIT_FOR_FOLDERS.sub('-', label)}",
            root=root,
            inputs=inputs,
            needs=(data.directory,),
        )
        plans[label] = [data, run]
    return plans
