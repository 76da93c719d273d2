"""Next-token objectives for any training loop: reward shaping, its special cases and its neighbours. Needs torch alone."""

from rlprior.objectives.batch import TokenMetrics
from rlprior.objectives.linear import METRICS_TOP_K, linear_shaped_cross_entropy, shaped_cross_entropy
from rlprior.objectives.parallel import VocabularyShard
from rlprior.objectives.registry import IMPLEMENTATIONS, OBJECTIVES
from rlprior.objectives.settings import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    Objective,
    RewardShaping,
    SampledReward,
)

__all__ = [
    "IMPLEMENTATIONS",
    "METRICS_TOP_K",
    "OBJECTIVES",
    "CrossEntropy",
    "DynamicFineTuning",
    "Focal",
    "LabelSmoothing",
    "Objective",
    "RewardShaping",
    "SampledReward",
    "TokenMetrics",
    "VocabularyShard",
    "linear_shaped_cross_entropy",
    "shaped_cross_entropy",
]
