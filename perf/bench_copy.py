"""The two ceilings as rows: a device copy and a bf16 GEMM, to which all other rows of the run are
compared.
"""

from collections.abc import Callable

import pytest
import torch

from perf.harness.machine import COPY_BYTES, MATMUL_SIZE
from perf.harness.rows import Inputs, Row, direct


def copy_inputs(device: torch.device) -> Inputs:
    source = torch.randn(COPY_BYTES // 2, device=device, dtype=torch.bfloat16)
    return {"target": torch.empty_like(source), "source": source}


def matmul_inputs(device: torch.device) -> Inputs:
    return {
        name: torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16)
        for name in "ab"
    }


ROWS = [
    Row(
        stage="copy",
        case="1GiB",
        provider="torch",
        make=copy_inputs,
        prepare=direct(lambda target, source: target.copy_(source)),
        expected=lambda inputs: inputs["source"].clone,
        bytes_moved=2 * COPY_BYTES,
        graph=False,  # a copy node in a CUDA graph takes a slower path
    ),
    Row(
        stage="matmul",
        case="bf16-8192",
        provider="torch",
        make=matmul_inputs,
        prepare=direct(lambda a, b: a @ b),
        expected=None,
        bytes_moved=3 * MATMUL_SIZE**2 * 2,
        flops=2 * MATMUL_SIZE**3,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_ceiling(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
