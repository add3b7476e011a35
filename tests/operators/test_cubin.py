"""Every hand-written kernel compiles to machine code for its target GPUs, from the launches of its
cases, fits their shared memory and spills no more than is listed here.
"""

import importlib
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from kda_ops._cases import operator_packages
from tests.support.operators import NAMES, RunKernels, cases, public_function
from tests.support.pipelines import overwritten_operands
from tests.support.sass import machine_code, wrong_descriptors


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; `shared` is the most shared memory a program may have, in bytes,
    `launches` how many of a kernel's launches are compiled.
    """

    backend: str
    arch: Any
    warp_size: int
    binary: str
    shared: int
    launches: int = 2


TARGETS = {
    "sm_80": Target("cuda", 80, 32, "cubin", 163 << 10),
    "sm_90a": Target("cuda", 90, 32, "cubin", 227 << 10),
    "sm_100a": Target("cuda", 100, 32, "cubin", 227 << 10),
    "sm_120": Target("cuda", 120, 32, "cubin", 99 << 10, launches=1),
    "gfx942": Target("hip", "gfx942", 64, "hsaco", 64 << 10),
}
# Bytes a thread may spill, per kernel and target, with the pinned compiler; other kernels spill
# nothing. A change that spills more is measured, and listed here.
SPILLS = {
    "chunk_scan_kernel": {"sm_80": 192},
    "chunk_segments_kernel": {"sm_80": 16},
    # without stages, where the shared memory is unknown; none with 2 or 3
    "chunk_scan_affine_kernel": {"sm_80": 448, "sm_90a": 32, "sm_120": 448},
    # the most of any launch tested; at the benchmarks' sizes on sm_90a, Triton 3.6: chunk_prepare
    # 72, with cu_seqlens 0; chunk_gated_prepare 8 and 16, without the norms 48
    "chunk_prepare_kernel": {"sm_80": 624, "sm_90a": 216, "sm_100a": 328, "sm_120": 616},
    "chunk_gated_prepare_kernel": {
        **{"sm_80": 648, "sm_90a": 88, "sm_100a": 192, "sm_120": 632, "gfx942": 72},
    },
    # with unpacked q, k and v and biases, at K = V = 64
    "kda_decode_kernel": {"sm_80": 168, "sm_90a": 184, "sm_100a": 184, "sm_120": 168},
    "chunk_prepare_general_kernel": {
        **{"sm_80": 2688, "sm_90a": 2688, "sm_100a": 2944, "sm_120": 2752},
    },
}
# where another Triton than the pinned one spills more
MORE_SPILLS = {
    "3.9": {
        "kda_decode_kernel": {"sm_80": 224, "sm_90a": 256},
        "chunk_prepare_kernel": {"sm_80": 744, "sm_90a": 688, "sm_100a": 704, "sm_120": 928},
        "chunk_gated_prepare_kernel": {"sm_80": 680, "sm_90a": 616, "sm_100a": 600, "sm_120": 728},
        "chunk_prepare_general_kernel": {"sm_90a": 3000, "sm_120": 2776},
    }
}
# modules of kernels launched by several operators
SHARED = (
    "kda_ops.delta_rule.chunked.kernels.prepare_gated",
    "kda_ops.delta_rule.chunked.kernels.prepare_general",
    "kda_ops.delta_rule.chunked.kernels.scan",
    "kda_ops.delta_rule.chunked.kernels.scan_affine",
    "kda_ops.delta_rule.chunked.kernels.scan_segments",
)
# of operators that share all others with one that is compiled here anyway
OWN = {"chunk_kda_gated_affine": ("chunk_scan_affine_kernel",)}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]


class Recorder:
    """Replaces `traceable`: records each launch instead of making it."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, kernel: Any) -> Any:
        recorder = self

        class Grid:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **kwargs: recorder.note(kernel, args, kwargs)

        return Grid()

    def note(self, kernel: Any, args: Any, kwargs: Any) -> None:
        from triton.runtime.jit import mangle_type

        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = {}, {}, []
        for parameter in kernel.params:
            value = values.get(parameter.name, parameter.default)
            # as a launch specializes: integers of 1 are constants, multiples of 16 known as such
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = mangle_type(value)
                if isinstance(value, torch.Tensor) or value % 16 == 0:
                    aligned.append(parameter.name)
        launch = Launch(kernel, signature, constants, tuple(aligned), options)
        self.launches[f"{kernel.fn.__name__} {signature} {constants} {options}"] = launch


@cache
def launches_of(name: str, shared: int = 0) -> dict[str, list[Launch]]:
    """The distinct launches of each of an operator's kernels, those at the benchmark's sizes
    first; for a GPU with so much shared memory, if that is given.
    """
    recorder = Recorder()
    with ExitStack() as patches:
        if shared:
            workspace = importlib.import_module("kda_ops.delta_rule.chunked.workspace")
            patches.enter_context(
                mock.patch.object(workspace, "shared_memory", return_value=shared)
            )
        for module in (f"{operator_packages()[name]}.kernel", *SHARED):
            importlib.import_module(module)
            if hasattr(sys.modules[module], "traceable"):
                patches.enter_context(mock.patch.multiple(sys.modules[module], traceable=recorder))
        for case in [*cases(name, perf=True)[:1], *cases(name, kernels=True)]:
            with torch.no_grad(), RunKernels():
                public_function(name)(**case.make(torch.device("cpu")))
    chosen: dict[str, list[Launch]] = {}
    for launch in recorder.launches.values():
        chosen.setdefault(launch.kernel.fn.__name__, []).append(launch)
    return chosen


def compile_launch(launch: Launch, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    if "PACKED" in names:  # recorded on a CPU; NVIDIA GPUs take their own instructions
        constants[(names.index("PACKED"),)] = target.backend == "cuda"
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=constants, attrs=attrs
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=dict(launch.options))


def spilled_bytes(binary: Any, target: Target, folder: Path) -> int:
    """Bytes of stack per thread."""
    if target.backend == "hip":
        (size,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", binary.asm["amdgcn"])
        return int(size)
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def assert_fits(launch: Launch, target: str, folder: Path) -> None:
    """Compiles a launch and checks the target's shared memory and the allowed spills."""
    gpu, kernel = TARGETS[target], launch.kernel.fn.__name__
    binary = compile_launch(launch, gpu)
    assert binary.asm[gpu.binary]
    assert binary.metadata.shared <= gpu.shared, kernel
    more = MORE_SPILLS.get(version("triton").rpartition(".")[0], {})
    noted = max(table.get(kernel, {}).get(target, 0) for table in (SPILLS, more))
    spilled = spilled_bytes(binary, gpu, folder)
    assert spilled <= noted, f"{kernel} spills {spilled} bytes a thread, noted {noted}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile(name: str, target: str, tmp_path: Path) -> None:
    assert launches_of(name), f"{name} launches no kernel"
    kernels = launches_of(name)
    for kernel in OWN.get(name, kernels):
        for launch in kernels[kernel][: TARGETS[target].launches]:
            assert_fits(launch, target, tmp_path)


SCANS = ("chunk_scan_kernel", "chunk_segments_kernel", "chunk_scan_affine_kernel")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("chunk_kda")])
def test_descriptors_are_whole(name: str, tmp_path: Path) -> None:
    """Of all launches of the scans, also for one token, and those of `prepare` that are compiled
    above: see `tests.support.sass`.
    """
    target = TARGETS["sm_90a"]
    for kernel, launches in launches_of(name, target.shared).items():
        if "fp32" in kernel or "general" in kernel or "inputs" in kernel:
            continue
        for launch in launches if kernel in SCANS else launches[: target.launches]:
            binary = compile_launch(launch, target)
            code = machine_code(binary, tmp_path)
            assert wrong_descriptors(code) == [], f"{kernel} {launch.constants}"
            assert overwritten_operands(binary.asm["ttgir"]) == [], f"{kernel} {launch.constants}"


LOOP = """
%a = ttg.local_alloc : () -> !ttg.memdesc<4x64x32xbf16, #shared>
%b = ttg.local_alloc : () -> !ttg.memdesc<BUFFERSx32x32xbf16, #shared>
%r = scf.for %i = %c0 to %c128 step %c32 iter_args(%x = %c) -> (tensor<64x32xf32>) {
  %a1 = ttg.memdesc_index %a[%i] : !ttg.memdesc<4x64x32xbf16, #shared>
  %b1 = ttg.memdesc_index %b[%j] : !ttg.memdesc<BUFFERSx32x32xbf16, #shared>
  %b2 = ttg.memdesc_trans %b1 {order = array<i32: 1, 0>} : !ttg.memdesc<32x32xbf16, #shared>
  %d = ttng.warp_group_dot %a1, %b2, %x {inputPrecision = 0 : i32, isAsync = true}
  %d1 = ttng.warp_group_dot_wait %d, %a1, %b2 {pendings = WAITS : i32} : tensor<64x32xf32>
  scf.yield %d1 : tensor<64x32xf32>
}
"""


@pytest.mark.parametrize(("buffers", "waits", "found"), [(3, 1, ["%b2"]), (4, 1, []), (3, 0, [])])
def test_overwritten_operands_are_found(buffers: int, waits: int, found: list[str]) -> None:
    code = LOOP.replace("BUFFERS", str(buffers)).replace("WAITS", str(waits))
    assert overwritten_operands(code) == found


def test_wrong_descriptors_are_found() -> None:
    line = "        /*{:04x}*/                   {} ;"
    code = [
        "UMOV UR4, URZ",
        "UIADD3.X UR13, UR4, 0x40000040, URZ, UP0, !UPT",
        "ULDC.64 UR4, c[0x0][0x210]",
        "UIADD3.X UR15, UR5, -0x3ffffff0, URZ, UP1, !UPT",
    ]
    assert wrong_descriptors("\n".join(map(line.format, range(0, 64, 16), code))) == [code[3]]


def test_sums_of_a_decode_step_stay_within_threads() -> None:
    """Few lanes share a row of the state, whichever axis this Triton distributes first."""
    (launch, *_) = launches_of("kda_decode")["kda_decode_kernel"]
    assert launch.constants["BLOCK_V"] * launch.constants["K"] >= 16384
    assert compile_launch(launch, TARGETS["sm_90a"]).asm["ptx"].count("shfl.sync") < 100
