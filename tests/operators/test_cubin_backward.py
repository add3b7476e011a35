"""The gradient kernels compile to machine code, fit the GPUs' shared memory and
spill no more than is listed here.
"""

import re
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from kda_ops._cases import with_states
from kda_ops._registry import OPERATORS
from kda_ops.conv.short_conv import backward as conv
from kda_ops.norm.rms_norm_gated import backward as norm
from tests.operators.test_cubin import TARGETS, Launch, Recorder, compile_launch, spilled_bytes
from tests.support.backward import KernelCase, arguments, launch_case, launch_saving
from tests.support.pipelines import overwritten_operands
from tests.support.sass import machine_code, wrong_descriptors

COMPILED = ("sm_80", "sm_90a", "sm_100a", "gfx942")
# Bytes a thread may spill with the pinned compiler; other kernels spill nothing.
SPILLS: dict[str, dict[str, int]] = {
    "backward_prepare_kernel": {"sm_80": 560, "sm_90a": 80, "sm_100a": 160, "gfx942": 140},
    "chunk_gradient_kernel": {"sm_80": 512, "sm_90a": 192, "sm_100a": 304},
    "states_forward_kernel": {"sm_80": 48, "sm_100a": 8},
    "states_backward_kernel": {"sm_80": 176},
    "general_prepare_kernel": {"sm_80": 2632, "sm_90a": 2568, "sm_100a": 2816},
    "general_backward_kernel": {"sm_80": 120, "sm_90a": 112, "sm_100a": 152},
    "general_chunk_kernel": {"sm_80": 1032, "sm_90a": 728, "sm_100a": 1616},
}
LAUNCHED = ("kernels.gradient", "gradient_general")
RAGGED = [0, 0, 1, 65, 65, 129, 150]


@cache
def launches(shared: int, segments: int = 1) -> dict[str, list[Launch]]:
    """The launches of each kernel, those from raw inputs first; scans in so many segments."""
    assert OPERATORS
    recorder = Recorder()
    with ExitStack() as patches:
        for name in LAUNCHED:
            module = import_module(f"kda_ops.delta_rule.chunked.{name}")
            patches.enter_context(mock.patch.object(module, "traceable", recorder))
        gradient = import_module("kda_ops.delta_rule.chunked.kernels.gradient")
        count = mock.patch.object(gradient, "gradient_segments", return_value=segments)
        patches.enter_context(count)
        workspace = import_module("kda_ops.delta_rule.chunked.gradient_workspace")
        patches.enter_context(mock.patch.object(workspace, "shared_memory", return_value=shared))
        inputs = import_module("kda_ops.delta_rule.chunked.kernels.prepare_gated")
        patches.enter_context(mock.patch.object(inputs, "traceable", recorder))
        sizes = {"T": 256, "H": 32, "K": 128, "V": 128}
        for module in (conv, norm):
            patches.enter_context(mock.patch.object(module, "traceable", recorder))
        x, weight = torch.randn(1, 256, 4096).bfloat16(), torch.randn(4096, 4).bfloat16()
        ends = torch.tensor([0, 100, 250])
        for bias, offsets, dy in (
            (None, None, list(x.split([2048, 1024, 1024], -1))),
            (weight[:, 0], ends, x),
        ):
            conv.launch_short_conv_backward(
                x, weight, bias, "silu", offsets, [dy], [True, True, bias is not None]
            )
        heads = x.unflatten(-1, (32, 128))
        norm.launch_rms_norm_gated_backward(
            heads, heads, weight[:128, 0], 1e-5, [heads], [True] * 3
        )
        for case in (
            KernelCase("chunk_kda_gated", {**sizes, "norm": True}),
            KernelCase("chunk_kda", {**sizes, "H": 1, "cu_seqlens": RAGGED}, with_states),
            KernelCase("chunk_kda_gated", {"T": 70, "K": 24, "V": 40, "dtype": torch.float32}),
            KernelCase("chunk_kda", {"T": 1}, with_states),
        ):
            launch_case(case, torch.device("cpu"))
        saving = KernelCase("chunk_kda_gated", {**sizes, "norm": True})
        launch_saving(saving.operator, arguments(saving, torch.device("cpu")))
    chosen: dict[str, list[Launch]] = {}
    for launch in recorder.launches.values():
        chosen.setdefault(launch.kernel.fn.__name__, []).append(launch)
    return chosen


@pytest.mark.parametrize("target", COMPILED)
def test_backward_kernels_compile(target: str, tmp_path: Path) -> None:
    gpu = TARGETS[target]
    found = launches(gpu.shared)
    with_output = found["states_forward_kernel"][-1]
    chosen = [(kernel, first) for kernel, (first, *_) in found.items()]
    for kernel, launch in [*chosen, ("states_forward_kernel", with_output)]:
        binary = compile_launch(launch, gpu)
        assert binary.asm[gpu.binary]
        assert binary.metadata.shared <= gpu.shared, kernel
        spilled = spilled_bytes(binary, gpu, tmp_path)
        noted = SPILLS.get(kernel, {}).get(target, 0)
        assert spilled <= noted, f"{kernel} spills {spilled} bytes a thread, noted {noted}"
        if target == "sm_90a":
            assert wrong_descriptors(machine_code(binary, tmp_path)) == [], kernel
            assert overwritten_operands(binary.asm["ttgir"]) == [], kernel


@pytest.mark.parametrize(
    "kernel", ["states_forward_kernel", "states_backward_kernel", "chunk_gradient_kernel"]
)
def test_descriptors_of_loops_are_whole(kernel: str, tmp_path: Path) -> None:
    """Also over one token; see `tests.support.sass`."""
    gpu = TARGETS["sm_90a"]
    found = launches(gpu.shared)[kernel]
    assert any(launch.constants.get("T") == 1 for launch in found)
    for launch in found:
        binary = compile_launch(launch, gpu)
        assert wrong_descriptors(machine_code(binary, tmp_path)) == []
        assert overwritten_operands(binary.asm["ttgir"]) == []


@pytest.mark.parametrize("kernel", ["states_forward_kernel", "states_backward_kernel"])
def test_scans_in_segments_compile(kernel: str, tmp_path: Path) -> None:
    gpu = TARGETS["sm_90a"]
    first, second = launches(gpu.shared, segments=4)[kernel][:2]
    assert (first.constants["FIRST"], second.constants["FIRST"]) == (True, False)
    for launch in (first, second):
        binary = compile_launch(launch, gpu)
        assert binary.metadata.shared <= gpu.shared
        assert spilled_bytes(binary, gpu, tmp_path) == 0
        assert overwritten_operands(binary.asm["ttgir"]) == []
        assert wrong_descriptors(machine_code(binary, tmp_path)) == []


@pytest.mark.parametrize("form", [0, 1], ids=["raw", "ragged"])
def test_warp_group_mma_operands_are_not_in_registers(form: int) -> None:
    """Such MMAs got wrong descriptors from ptxas 12.8: `perf/notes/backward.md`."""
    launch = launches(TARGETS["sm_90a"].shared)["chunk_gradient_kernel"][form]
    ptx = compile_launch(launch, TARGETS["sm_90a"]).asm["ptx"]
    products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)
    assert products
    assert "{" not in products
