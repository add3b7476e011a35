"""Elements past 2^31: results far into a tensor equal those computed separately, on a GPU.

Inputs are windows that slide over a small buffer, eight elements a token, so that only results (and
a kernel's own workspace) take memory; states are pages far apart.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from kda_ops.delta_rule.recurrent_kda.cases import recurrent_inputs

DEVICE = torch.device("cuda")
H, D = 32, 128
EDGE = 2**31
TAIL = 4096  # tokens that are computed again alone: of 64-token chunks, as all of T
T = EDGE // (H * D) + TAIL
STEP = 8  # elements from one token to the next: 16 bytes of bf16
PAGE = 2**19  # elements from one page to the next
GIB = 2**30
ROUNDING = 1e-3  # a block of another size may sum in another order

pytestmark = [pytest.mark.gpu]


def needs(gib: int) -> pytest.MarkDecorator:
    """Memory of the card: an H200 has 139 GiB, an A100 40 or 80."""
    available = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return pytest.mark.skipif(available < gib * GIB, reason=f"needs {gib} GiB")


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sliding(
    *sizes: int, tokens: int = T, size: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`[1, tokens, *sizes]`: token t begins `STEP * t` elements into a random buffer."""
    row = torch.Size(sizes).numel()
    buffer = (size * torch.randn(tokens * STEP + row, device=DEVICE)).to(dtype)
    inner = torch.empty(sizes, device="meta").stride()
    return buffer.as_strided((1, tokens, *sizes), (tokens * STEP, STEP, *inner))


def offsets() -> Tensor:
    """Everything but the tail, then the tail."""
    return torch.tensor([0, T - TAIL, T], device=DEVICE)


def assert_same(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert out.isfinite().all()
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error <= ROUNDING, f"relative error {error:.2e}"


def assert_ends_are_as_alone(call: Callable[..., Tensor], **inputs: Any) -> None:
    """The first and the last tokens of a long input against calls on them alone."""
    out = call(**inputs)
    assert out.numel() > EDGE
    for rows in (slice(0, TAIL), slice(T - TAIL, T)):
        alone = {
            name: y[:, rows] if isinstance(y, Tensor) and y.shape[:2] == (1, T) else y
            for name, y in inputs.items()
        }
        assert_same(out[:, rows], call(**alone))


@needs(20)
def test_gate() -> None:
    A_log, dt_bias = torch.randn(H, device=DEVICE), torch.randn(H, D, device=DEVICE)
    assert_ends_are_as_alone(kda_ops.gate, raw_gate=sliding(H, D), A_log=A_log, dt_bias=dt_bias)


@needs(20)
def test_gate_cumsum() -> None:
    A_log, dt_bias = torch.randn(H, device=DEVICE), torch.randn(H, D, device=DEVICE)
    assert_ends_are_as_alone(
        kda_ops.gate_cumsum, raw_gate=sliding(H, D), A_log=A_log, dt_bias=dt_bias
    )


@needs(20)
def test_chunk_cumsum() -> None:
    assert_ends_are_as_alone(kda_ops.chunk_cumsum, g=sliding(H, D, dtype=torch.float32))


@needs(20)
def test_l2norm() -> None:
    assert_ends_are_as_alone(kda_ops.l2norm, x=sliding(H, D))


@needs(20)
def test_rms_norm_gated() -> None:
    weight = torch.randn(D, device=DEVICE).bfloat16()
    o, gate = sliding(H, D), sliding(H, D)
    assert_ends_are_as_alone(kda_ops.rms_norm_gated, o=o, output_gate=gate, weight=weight)


def conv_inputs() -> dict[str, Any]:
    channels = 3 * H * D
    weight = torch.randn(channels, 4, device=DEVICE).bfloat16()
    return {"x": sliding(channels), "weight": weight}


@needs(24)
def test_short_conv() -> None:
    inputs = conv_inputs()
    y = kda_ops.short_conv(**inputs, cu_seqlens=offsets())
    for rows in (slice(0, TAIL), slice(T - TAIL, T)):
        alone = kda_ops.short_conv(inputs["x"][:, rows], inputs["weight"])
        assert_same(y[:, rows], alone)


@needs(24)
def test_short_conv_qkv() -> None:
    inputs, sizes = conv_inputs(), {"key_dim": H * D, "head_dim": D}
    results = kda_ops.fused.short_conv_qkv(**inputs, **sizes, cu_seqlens=offsets())
    for rows in (slice(0, TAIL), slice(T - TAIL, T)):
        alone = kda_ops.fused.short_conv_qkv(inputs["x"][:, rows], inputs["weight"], **sizes)
        for y, expected in zip(results, alone, strict=True):
            assert_same(y[:, rows], expected)


@needs(60)
def test_chunk_kda_gated() -> None:
    inputs: dict[str, Any] = {name: sliding(H, D) for name in ("q", "k", "v", "raw_gate")}
    inputs["raw_beta"] = sliding(H)
    options: dict[str, Any] = {
        "A_log": torch.empty(H, device=DEVICE).uniform_(1, 16).log(),
        "dt_bias": torch.randn(H, D, device=DEVICE) - 4,
        "qk_norm_eps": 1e-6,
        "output_final_state": True,
    }
    o, final = kda_ops.fused.chunk_kda_gated(**inputs, **options, cu_seqlens=offsets())
    assert o.numel() > EDGE
    last = {name: y[:, T - TAIL :] for name, y in inputs.items()}
    expected_o, expected_final = kda_ops.fused.chunk_kda_gated(**last, **options)
    assert_same(o[:, T - TAIL :], expected_o)
    assert_same(final[1:], expected_final)
    first = {name: y[:, :TAIL] for name, y in inputs.items()}
    assert_same(o[:, :TAIL], kda_ops.fused.chunk_kda_gated(**first, **options)[0])


@needs(60)
def test_chunk_kda() -> None:
    inputs = {name: sliding(H, D, size=D**-0.5) for name in ("q", "k", "v")}
    inputs["beta"] = sliding(H).sigmoid()
    A_log = torch.empty(H, device=DEVICE).uniform_(1, 16).log()
    inputs["g_cumsum"] = kda_ops.gate_cumsum(
        sliding(H, D, size=0.5), A_log, torch.full((H, D), -4.0).to(A_log)
    )
    assert inputs["g_cumsum"].numel() > EDGE
    o, final = kda_ops.chunk_kda(**inputs, output_final_state=True, cu_seqlens=offsets())
    last = {name: y[:, T - TAIL :] for name, y in inputs.items()}
    expected_o, expected_final = kda_ops.chunk_kda(**last, output_final_state=True)
    assert_same(o[:, T - TAIL :], expected_o)
    assert_same(final[1:], expected_final)
    first = {name: y[:, :TAIL] for name, y in inputs.items()}
    assert_same(o[:, :TAIL], kda_ops.chunk_kda(**first)[0])


NEAR = 1
FAR = EDGE // PAGE + 3


def far_pages(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`[FAR + 1, *shape]`, pages `PAGE` elements apart; only those that are used hold values."""
    assert shape.numel() <= PAGE
    pages = torch.empty((FAR + 1) * PAGE, dtype=dtype, device=DEVICE)
    inner = torch.empty(shape, device="meta").stride()
    view = pages.as_strided((FAR + 1, *shape), (PAGE, *inner))
    view[NEAR] = torch.randn(shape, device=DEVICE)
    view[FAR] = view[NEAR]
    return view


def assert_far_is_near(call: Callable[..., Any], inputs: dict[str, Any], *states: str) -> None:
    """Two sequences with equal tokens and states, one in a near slot and one in a far one."""
    before = {name: inputs[name][NEAR].clone() for name in states}
    with torch.no_grad():
        out = call(**inputs)
    rows = out.flatten(0, out.dim() - 3) if out.dim() > 2 else out
    assert rows.isfinite().all()
    assert torch.equal(rows[0], rows[1])
    for name in states:
        assert not torch.equal(inputs[name][NEAR], before[name]), f"{name} was not written"
        assert torch.equal(inputs[name][FAR], inputs[name][NEAR]), f"{name} differs"


def twice(y: Tensor, axis: int) -> Tensor:
    """The first of two rows, twice."""
    return y.narrow(axis, 0, 1).expand(*y.shape[:axis], 2, *y.shape[axis + 1 :]).contiguous()


@needs(20)
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_slots_of_kda_decode(layout: str) -> None:
    inputs = kda_decode_inputs(2, H, H, D, D, layout=layout, device=DEVICE)
    for name in ("raw_gate", "raw_beta", "output_gate"):
        inputs[name] = twice(inputs[name], 1)
    inputs["x"] = twice(inputs["x"], 0)
    inputs["conv_state"] = far_pages(inputs["conv_state"].shape[1:], torch.bfloat16)
    inputs["state"] = far_pages(inputs["state"].shape[1:], torch.float32)
    inputs["state_indices"] = torch.tensor([NEAR, FAR], dtype=torch.int32, device=DEVICE)
    assert_far_is_near(kda_ops.fused.kda_decode, inputs, "conv_state", "state")


@needs(12)
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_slots_of_short_conv_update(layout: str) -> None:
    inputs = kda_decode_inputs(2, H, H, D, D, layout=layout, device=DEVICE)
    assert_far_is_near(
        kda_ops.short_conv_update,
        {
            "x": twice(inputs["x"], 0),
            "weight": inputs["weight"],
            "conv_state": far_pages(inputs["conv_state"].shape[1:], torch.bfloat16),
            "state_indices": torch.tensor([NEAR, FAR], dtype=torch.int32, device=DEVICE),
            "layout": layout,
        },
        "conv_state",
    )


@needs(12)
def test_slots_of_recurrent_kda() -> None:
    inputs = recurrent_inputs(2, 1, H, H, D, D, device=DEVICE)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name] = twice(inputs[name], 0)
    inputs["state"] = far_pages(inputs["state"].shape[1:], torch.float32)
    inputs["state_indices"] = torch.tensor([NEAR, FAR], dtype=torch.int32, device=DEVICE)
    assert_far_is_near(kda_ops.recurrent_kda, inputs, "state")


@needs(20)
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_slots_of_state_copy(layout: str) -> None:
    L, channels = 3, 3 * H * D
    conv = far_pages(torch.Size((L, channels) if layout == "SD" else (channels, L)), torch.bfloat16)
    recurrent = far_pages(torch.Size((H, D, D)), torch.float32)
    for pages in (conv, recurrent):
        pages[FAR] = 0
    plan = torch.tensor([[NEAR, NEAR, FAR, 0]], device=DEVICE)
    kda_ops.state_copy(conv, recurrent, plan, layout=layout)
    for pages in (conv, recurrent):
        assert pages[NEAR].any()
        assert torch.equal(pages[FAR], pages[NEAR])
