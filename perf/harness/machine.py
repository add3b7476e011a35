"""The machine of a run: the GPU, its software, and the ceilings for the rooflines.

`python -m perf.harness.machine` prints the path for a new run.
"""

import datetime
import functools
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kda_ops._versions import version
from perf.harness.timing import gpu_seconds

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
HISTORY = Path(__file__).parent.parent / "history"


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches in this run: bytes per second of a copy (read plus written) and FLOPs
    per second of a bf16 GEMM.
    """

    bytes_per_second: float
    flops_per_second: float

    def roofline_seconds(self, bytes_moved: int, flops: int) -> float:
        """The lower bound for any implementation: the longer of the times for the bytes and for the
        GEMMs.
        """
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


@functools.cache
def ceilings() -> Ceilings:
    """Measured once per process, on random data (a GEMM of zeros would run faster)."""
    source = torch.randn(COPY_BYTES // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = gpu_seconds(lambda: target.copy_(source))
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    product = gpu_seconds(lambda: a @ b)
    return Ceilings(2 * COPY_BYTES / copy, 2 * MATMUL_SIZE**3 / product)


def software() -> dict[str, Any]:
    """Versions of everything that affects a measurement."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "kda_ops": version("kda-ops"),
        "fla": version("fla-core"),
    }


@functools.cache
def cpu() -> str:
    """The name of the processor, or of its architecture where it has none."""
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    return str(get_cpu_info().get("brand_raw", platform.machine()))


def gpu() -> dict[str, Any]:
    """Facts about the current GPU. Clocks are read, never set."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
        **_nvidia_smi("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"),
    }


def _nvidia_smi(*fields: str) -> dict[str, str]:
    """Fields that only nvidia-smi knows; nothing without it (another vendor's GPU)."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in answer.split(",")), strict=False))


def folder_of(gpu_name: str) -> Path:
    """The folder of a GPU's runs: `history/h200` for an `NVIDIA H200`."""
    return HISTORY / "-".join(gpu_name.lower().replace("nvidia", "").replace("/", " ").split())


def next_run() -> Path:
    """A new file for a run, in the folder of this GPU; in `build/` without one."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M")
    if not torch.cuda.is_available():
        return Path("build") / f"{now}.json"
    return folder_of(torch.cuda.get_device_name()) / f"{now}.json"


if __name__ == "__main__":
    print(next_run())
