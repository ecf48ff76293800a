"""The `triton` backend: the functions of kernels/contract.py and the fused loss, launched on the logits' device.

Importing this imports Triton. Without a GPU the kernels run only in Triton's interpreter (TRITON_INTERPRET=1, set
before anything imports Triton), which is for tests.
"""

from grpo_kernels.kernels.triton.group_robust import group_robust_forward
from grpo_kernels.kernels.triton.logps import token_logps_backward, token_logps_forward

__all__ = ["group_robust_forward", "token_logps_backward", "token_logps_forward"]
