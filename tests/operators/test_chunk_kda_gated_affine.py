"""`chunk_kda_gated_affine` beyond the common cases: it is the recurrence, whatever state enters."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kda_ops.delta_rule.chunked import launch
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.delta_rule.chunked.kernels import scan
from kda_ops.fused import chunk_kda_gated, chunk_kda_gated_affine
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import run_kernels
from tests.support.oracle import assert_close, copy_inputs

CPU = torch.device("cpu")
BF16, FP64 = torch.bfloat16, torch.float64
RAGGED = [0, 0, 1, 66, 66, 130, 150]
KINDS = ["softplus", "harsh", "slow", "bounded"]


def exact_inputs(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return copy_inputs(chunk_kda_gated_inputs(CPU, norm=True, **options), FP64)


def states(N: int, v: Tensor, K: int) -> Tensor:
    return torch.randn(N, *v.shape[2:], K, dtype=FP64)


def applied(
    found: tuple[Tensor, ...], S: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and final state with the states `S [N, HV, V, K]` before the sequences."""
    o, reads, final, transition = (x.double() for x in found)
    if cu_seqlens is None:
        read = torch.einsum("bthk,bhvk->bthv", reads, S)
    else:
        lengths = cu_seqlens.diff().long()
        of_token = S.repeat_interleave(lengths, 0)  # [tokens of sequences, HV, V, K]
        read = torch.zeros_like(o)
        read[0, : len(of_token)] = torch.einsum(
            "thk,thvk->thv", reads[0, : len(of_token)], of_token
        )
    return o + read, S @ transition + final


@pytest.mark.parametrize("gate", KINDS)
@pytest.mark.parametrize("beta_scale", [1.0, 2.0])
def test_a_dense_batch(gate: str, beta_scale: float) -> None:
    inputs = exact_inputs(B=2, T=150, H=2, HV=4, K=12, V=7, gate=gate, beta_scale=beta_scale)
    S = states(2, inputs["v"], 12)
    expected = chunk_kda_gated(**inputs, initial_state=S, output_final_state=True)
    found = chunk_kda_gated_affine(**inputs)
    for x, y in zip(applied(found, S), expected, strict=True):
        torch.testing.assert_close(x, y)
    assert found[3].abs().max() <= 1


def test_packed_sequences_some_of_which_are_entered() -> None:
    """To the states that are known those that enter are added; nothing enters the others."""
    inputs = exact_inputs(T=160, K=10, V=14, gate="slow", cu_seqlens=RAGGED)
    known, S = states(6, inputs["v"], 10), states(6, inputs["v"], 10)
    entered = torch.tensor([True, False, True, False, False, True])
    S[~entered] = 0
    found = chunk_kda_gated_affine(**inputs, initial_state=known, entered=entered)
    expected = chunk_kda_gated(**inputs, initial_state=known + S, output_final_state=True)
    for x, y in zip(applied(found, S, inputs["cu_seqlens"]), expected, strict=True):
        torch.testing.assert_close(x, y)
    _, reads, _, transition = found
    assert transition[~entered].count_nonzero() == 0
    assert torch.equal(transition[0, 0], torch.eye(10, dtype=FP64))  # of no tokens
    assert all(reads[0, a:b].count_nonzero() == 0 for a, b in ((0, 1), (66, 130), (150, 160)))
    assert reads[0, 1:66].all()
    assert reads[0, 130:150].all()


def test_two_parts_are_the_whole() -> None:
    inputs = exact_inputs(T=150, H=2, K=12, V=7, gate="slow")
    tokens = ("q", "k", "v", "raw_gate", "raw_beta")
    whole = chunk_kda_gated_affine(**inputs)
    left, right = (
        chunk_kda_gated_affine(**inputs | {n: inputs[n][:, part] for n in tokens})
        for part in (slice(70), slice(70, None))
    )
    o, final = applied(right, left[2])
    torch.testing.assert_close(o, whole[0][:, 70:])
    torch.testing.assert_close(final, whole[2])
    torch.testing.assert_close(left[3] @ right[3], whole[3])
    reads = torch.einsum("bthk,bhjk->bthj", right[1], left[3])
    torch.testing.assert_close(reads, whole[1][:, 70:])


def test_gradients_are_those_of_the_recurrence() -> None:
    inputs = exact_inputs(T=80, K=6, V=5, gate="slow")
    S, weights = states(1, inputs["v"], 6), (torch.randn(1, 80, 1, 5), torch.randn(1, 1, 5, 6))

    def gradients(call: Any) -> list[Tensor]:
        leaves = {
            n: x.clone().requires_grad_() if isinstance(x, Tensor) else x for n, x in inputs.items()
        }
        parts = zip(call(**leaves), weights, strict=True)
        loss = torch.stack([(x * w).sum() for x, w in parts]).sum()
        return list(
            torch.autograd.grad(loss, [x for x in leaves.values() if isinstance(x, Tensor)])
        )

    found = gradients(lambda **x: applied(chunk_kda_gated_affine(**x), S))
    expected = gradients(lambda **x: chunk_kda_gated(**x, initial_state=S, output_final_state=True))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", KINDS)
def test_kernels_with_a_state_that_enters(gate: str) -> None:
    """What the results are for, by the tolerance of the recurrence: also where nothing is left."""
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(CPU, T=150, H=2, K=64, V=64, gate=gate, norm=True)
    S = states(1, inputs["v"], 64).float()
    found = applied(run_kernels(chunk_kda_gated_affine)(**inputs), S.double())
    options = {"initial_state": S, "output_final_state": True}
    low = chunk_kda_gated(**inputs, **options)
    exact = chunk_kda_gated(**copy_inputs(inputs | options, FP64))
    for x, y, z in zip(found, low, exact, strict=True):
        assert_close(x.to(y.dtype), y, z, BF16)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_separate_scans_are_the_one_of_both(dtype: torch.dtype) -> None:
    """As in fp32 and in segments: over the columns of the state, and over those of the keys."""
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(
        CPU, T=170, K=64, V=128, dtype=dtype, gate="slow", norm=True, cu_seqlens=RAGGED
    )
    inputs["entered"] = torch.tensor([True, False, True, False, True, True])
    widths = []

    def counted(o: Tensor, *arguments: Any) -> None:
        widths.append(o.shape[-1])
        scan.launch_scan(o, *arguments)

    kernels = run_kernels(chunk_kda_gated_affine)
    one = kernels(**inputs)
    # of the decision, and then of each scan
    counts = mock.patch.object(scan, "segment_count", side_effect=[2, 1, 1])
    with counts, mock.patch.object(launch, "launch_scan", counted):
        separate = kernels(**inputs)
    assert widths == [128, 64]
    for x, y in zip(one, separate, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_launches_when_compiled_for_a_gpu(packed: bool, dynamic: bool) -> None:
    offsets = [0, 70, 160] if packed else None
    inputs = chunk_kda_gated_inputs(CPU, T=170, norm=True, cu_seqlens=offsets)
    entered = torch.tensor([True, False] if packed else [True])
    tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)} | {"entered": entered}
    rest = {n: x for n, x in inputs.items() if n not in tensors}
    _, (code,) = cuda_code(
        lambda **x: chunk_kda_gated_affine(**x, **rest), **copy_inputs(tensors), dynamic=dynamic
    )
    launches = [name for name in summary(code).launches if name.startswith("chunk_")]
    assert launches == ["chunk_gated_prepare_kernel", "chunk_scan_affine_kernel"]
    assert not summary(code).externs


def bad(message: str, **change: Any) -> Any:
    return pytest.param(change, message, id=re.sub(r"\W+", "-", message))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad("entered must have shape [1], got (2,)", entered=torch.tensor([True, False])),
        bad("entered must have dtype bool, got int64", entered=torch.tensor([1])),
        bad("k must have shape [1, 70, 1, 16], got (1, 70, 2, 16)", k=torch.zeros(1, 70, 2, 16)),
        bad("initial_state must have shape", initial_state=torch.zeros(1, 1, 16, 24)),
        bad("beta_scale must be 1 or 2, got 3", beta_scale=3),
        bad("qk_norm_eps must", qk_norm_eps=-1.0),
        bad("cu_seqlens must", cu_seqlens=torch.tensor([0, 71])),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    inputs = chunk_kda_gated_inputs(CPU, T=70, K=16, V=24, dtype=torch.float32)
    before = copy_inputs(inputs)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        chunk_kda_gated_affine(**{**inputs, **change})
    for name, x in before.items():
        assert not isinstance(x, Tensor) or torch.equal(inputs[name], x)
