"""Group Robust Preference Optimization: losses for preference pairs from K groups, aimed at the worst group."""

from grpo_kernels._version import __version__
from grpo_kernels.functional import (
    linear_sequence_logps,
    linear_token_logps,
    preference_losses,
    sequence_logps,
    token_logps,
)
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.kernels.dispatch import backends
from grpo_kernels.losses import GroupRobustLoss, LinearGroupRobustLoss
from grpo_kernels.types import IGNORE_INDEX, GroupRobustOutput, TokenMetrics, VocabShard

__all__ = [
    "IGNORE_INDEX",
    "GroupRobustLoss",
    "GroupRobustOutput",
    "GroupWeights",
    "LinearGroupRobustLoss",
    "TokenMetrics",
    "VocabShard",
    "__version__",
    "backends",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_losses",
    "sequence_logps",
    "token_logps",
]
