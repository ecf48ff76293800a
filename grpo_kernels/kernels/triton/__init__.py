"""The `triton` backend: the functions of kernels/contract.py, launched on the logits' device.

Importing this imports Triton. Without a GPU the kernels run only in Triton's interpreter (TRITON_INTERPRET=1, set
before anything imports Triton), which is for tests.
"""

from grpo_kernels.kernels.triton.logps import token_logps_backward, token_logps_forward

__all__ = ["token_logps_backward", "token_logps_forward"]
