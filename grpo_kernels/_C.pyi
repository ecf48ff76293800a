# The compiled extension (csrc/bindings.cpp). All arguments are positional.

from typing import Any, Protocol

_Strides2 = tuple[int, int]
_Strides3 = tuple[int, int, int]

class _OfRows(Protocol):
    def __call__(
        self,
        instruction_set: str,
        dtype: str,
        shape: tuple[int, int, int],
        logits: int,
        logits_strides: _Strides3,
        labels: int,
        label_bytes: int,
        labels_strides: _Strides2,
        ignore_index: int,
        token_logps: int,
        lse: int,
        num_threads: int,
        /,
    ) -> None: ...

token_logps_forward: _OfRows
token_logps_and_unit_gradient: _OfRows  # over the logits

def token_logps_backward(
    instruction_set: str,
    dtype: str,
    shape: tuple[int, int, int],
    dtoken_logps: int,
    dtoken_logps_strides: _Strides2,
    logits: int,
    logits_strides: _Strides3,
    labels: int,
    label_bytes: int,
    labels_strides: _Strides2,
    lse: int,
    ignore_index: int,
    out: int,
    out_strides: _Strides3,
    num_threads: int,
    /,
) -> None: ...
def instruction_sets() -> list[str]: ...
def build_info() -> dict[str, Any]: ...

cuda: Any  # csrc/cuda/bindings.h; only in a build with CUDA kernels
testing: Any
