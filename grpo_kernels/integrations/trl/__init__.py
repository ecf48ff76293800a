"""Group-robust DPO and IPO in TRL: `GroupRobustDPOTrainer` is TRL's DPOTrainer for data with a ``group`` column.

    from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

TRL is imported with this package, and with no other. Where TRL 1.15 to 1.16 computes its loss from log-probabilities,
this trainer computes them by `add_sequence_logps` and the loss by `GroupRobustLoss`; the rest, from tokenising to
checkpoints, stays TRL's. `config` has the options and what is refused of TRL's, `data` the groups of a data set and its
collator, `metrics` what is logged, `trainer` the rest.
"""

from grpo_kernels.integrations.trl.config import GroupRobustDPOConfig, check_version
from grpo_kernels.integrations.trl.trainer import GroupRobustDPOTrainer

__all__ = ["GroupRobustDPOConfig", "GroupRobustDPOTrainer", "check_version"]
