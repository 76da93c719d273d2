"""A study: one recipe, several objectives, several seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rlprior.data.config import DataConfig
from rlprior.evaluation.config import EvaluationConfig
from rlprior.models.presets import ModelConfig
from rlprior.objectives import CrossEntropy, Objective
from rlprior.rl.config import RLConfig
from rlprior.training.language_model import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One objective under study.

    Args:
        objective: used in pre-training and mid-training; reinforcement learning is the same for all arms.
        label: what tables and figures call it.
    """

    objective: Objective
    label: str


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Arms x seeds over pre-training, mid-training and reinforcement learning, each stage evaluated.

    Args:
        title: headline of the report.
        arms: by name; names are used in folder names.
        baseline: the arm that the others are compared with; cross-entropy in the paper.
        seeds: of initialisation, data order, prompts and sampling; arms of one seed share them all.
        data: corpus, prepared once for all arms.
        model, pretrain, midtrain, rl, evaluation: the stages. The arms set `objective`.
        data_dir: folder that relative paths of data and tasks start from.
    """

    title: str
    arms: dict[str, ArmConfig]
    baseline: str
    data: DataConfig
    pretrain: TrainingConfig
    midtrain: TrainingConfig
    rl: RLConfig
    evaluation: EvaluationConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    seeds: tuple[int, ...] = (0,)
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline!r} is not an arm; arms: {', '.join(self.arms)}")
        for name in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(f"arm name {name!r}: use letters, digits, '-', '_' and '.'")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds needs at least one seed, and no seed twice")
        for stage in ("pretrain", "midtrain"):
            if getattr(self, stage).objective != CrossEntropy():
                raise ValueError(f"{stage}.objective is set by the arms; remove it")


@dataclass(frozen=True, kw_only=True)
class TrainFile:
    """What `rlprior train` reads: a corpus and one language-model stage on it.

    Args:
        data: corpus, prepared beside the run.
        training, model, seed: as in a study's stage.
        init_from: Hugging Face folder to go on from; left out, a new model is built.
        data_dir: folder that relative paths of data start from.
    """

    data: DataConfig
    training: TrainingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0
    init_from: str | None = None
    data_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateFile:
    """What `rlprior evaluate` reads: where the held-out text comes from, and what is measured.

    Args:
        data: corpus, prepared beside the run; its held-out documents are the text.
        evaluation: what is measured.
        window_tokens: longest context of a predicted token.
        data_dir: folder that relative paths of data and tasks start from.
    """

    data: DataConfig
    evaluation: EvaluationConfig
    window_tokens: int = 4096
    data_dir: str | None = None
