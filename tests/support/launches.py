"""What a compiled layer launches besides its GEMMs, from the generated CUDA code."""

from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from tests.support.fake_cuda import Summary, cuda_code, summary

DECODE = ["kda_decode_kernel"]
PREFILL = [
    "short_conv_kernel",
    "chunk_gated_prepare_kernel",
    "chunk_scan_kernel",
    "rms_norm_gated",
]
SAVING = [PREFILL[0], "backward_prepare_kernel", "states_forward_kernel", PREFILL[3]]  # in training
PREFILL_UNPACKED = ["short_conv_qkv_kernel", *PREFILL[1:]]  # q, k and v not packed
FORBIDDEN = ("copy_(", "fill_(", "zero_(", ".item()", ".tolist()", ".cpu()", "synchronize()")
GEMMS = ("extern_kernels.mm", "extern_kernels.addmm", "extern_kernels.bmm")


def launches(module: Any, *args: Any, dynamic: bool | None = False, **kwargs: Any) -> Summary:
    """What the one graph of a module launches, without its GEMMs. Copies, fills and waits for the
    device fail.
    """
    with torch.no_grad():
        _, (source,) = cuda_code(module, *args, dynamic=dynamic, **kwargs)
    body = source[source.index("def call(") : source.index("\ndef benchmark")]
    assert [text for text in FORBIDDEN if text in body] == []
    found = summary(source)
    externs = [name for name in found.externs if name not in GEMMS]
    return Summary(found.launches, externs, found.allocations)


def expect(found: Summary, kernels: list[str]) -> None:
    """Exactly these launches, in order, by parts of their names."""
    assert found.externs == []
    assert len(found.launches) == len(kernels), str(found)
    for name, part in zip(found.launches, kernels, strict=True):
        assert part in name, str(found)


def mark_dynamic(*tensors: Tensor | None, axis: int = 0) -> None:
    """Makes a size of some tensors symbolic. (`dynamic=True` would also turn Python floats, such as
    a module's eps, into tensors.)
    """
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, axis)
