"""short_conv_qkv against the definition token by token, against its parts, its skipped rows, its
errors and its compiled code.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import config, l2norm, short_conv
from kda_ops._cases import Case, paged_conv_state
from kda_ops.fused import short_conv_qkv
from kda_ops.tuning import override
from kda_ops.tuning.configs import DEFAULTS
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import cases, run_kernels
from tests.support.oracle import assert_accurate

CPU = torch.device("cpu")
LENGTHS = (1, 0, 9, 2, 3, 5)
T = 24  # four rows of padding
OFFSETS = torch.tensor((0, *LENGTHS)).cumsum(0)
SLOTS = torch.tensor([3, 5, 1, 0, 6, 2])
INITIAL = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
H, K, VALUE_DIM = 2, 6, 9
KEY_DIM, D = H * K, 2 * H * K + VALUE_DIM
SIZES = {"key_dim": KEY_DIM, "head_dim": K}
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])
shapes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def rows_of(state: Tensor, layout: str) -> Tensor:
    """`[slots, L, D]` from either layout."""
    return state if layout == "SD" else state.transpose(1, 2)


def arguments(W: int = 4, layout: str = "SD", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "x": torch.randn(1, T, D, dtype=dtype),
        "weight": torch.randn(D, W, dtype=dtype),
        "bias": torch.randn(D, dtype=dtype),
        **SIZES,
        "norm_eps": 1e-3,
        "conv_state": paged_conv_state(7, W, D, layout, dtype, CPU),
        "state_indices": SLOTS,
        "has_initial_state": INITIAL,
        "cu_seqlens": OFFSETS,
        "layout": layout,
    }


@layouts
@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_against_the_definition(W: int, activation: str | None, layout: str) -> None:
    inputs = arguments(W, layout) | {"activation": activation}
    weight, state = inputs["weight"], rows_of(inputs["conv_state"], layout).clone()
    q, k, v = short_conv_qkv(**inputs)
    expected = [torch.zeros_like(y) for y in (q, k, v)]
    for n, slot in enumerate(SLOTS.tolist()):
        if slot == 0:
            continue
        window = [state[slot, i] if INITIAL[n] else torch.zeros(D) for i in range(W - 1)]
        for t in range(int(OFFSETS[n]), int(OFFSETS[n + 1])):
            window.append(inputs["x"][0, t])
            y = inputs["bias"] + sum(weight[:, w] * window[w - W] for w in range(W))
            if activation is not None:
                y = y / (1 + torch.exp(-y))
            for part, first in ((0, 0), (1, KEY_DIM)):
                for h in range(H):
                    head = y[first + h * K : first + (h + 1) * K]
                    expected[part][0, t, h] = head / torch.sqrt((head * head).sum() + 1e-3)
            expected[2][0, t] = y[2 * KEY_DIM :]
        state[slot, : W - 1] = torch.stack(window[len(window) - (W - 1) :])
    for out, want in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(out, want)
    torch.testing.assert_close(rows_of(inputs["conv_state"], layout), state)


@layouts
def test_equals_its_parts(layout: str) -> None:
    inputs = arguments(layout=layout)
    state = inputs["conv_state"].clone()
    q, k, v = short_conv_qkv(**inputs)
    y = short_conv(
        inputs["x"],
        inputs["weight"],
        inputs["bias"],
        conv_state=state,
        state_indices=SLOTS,
        has_initial_state=INITIAL,
        cu_seqlens=OFFSETS,
        layout=layout,
    )
    parts = y.split([KEY_DIM, KEY_DIM, VALUE_DIM], dim=-1)
    for out, part in zip((q, k), parts, strict=False):
        torch.testing.assert_close(out, l2norm(part.unflatten(-1, (H, K)), eps=1e-3))
    assert torch.equal(v, parts[2])
    assert torch.equal(inputs["conv_state"], state)


def test_nothing_is_rounded_between_convolution_and_norm() -> None:
    inputs: dict[str, Any] = {"x": torch.randn(1, 64, D), "weight": torch.randn(D, 4)} | SIZES
    half = {n: x.bfloat16() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in half.items()}
    for out, exact in zip(short_conv_qkv(**half), short_conv_qkv(**wide), strict=True):
        spacing = torch.finfo(torch.bfloat16).eps * exact.abs()
        assert ((out.double() - exact).abs() <= spacing / 2 * (1 + 2**-8)).all()


@layouts
def test_pieces_equal_the_whole(layout: str) -> None:
    x, weight = torch.randn(2, 23, D), torch.randn(D, 4)
    state = paged_conv_state(3, 3, D, layout, torch.float32, CPU)
    whole_state = state.clone()
    kw: dict[str, Any] = {"state_indices": torch.tensor([2, 1]), "layout": layout, **SIZES}
    whole = short_conv_qkv(x, weight, conv_state=whole_state, **kw)
    pieces, known = [], None
    for a, b in ((0, 9), (9, 11), (11, 11), (11, 12), (12, 23)):
        pieces.append(
            short_conv_qkv(x[:, a:b], weight, conv_state=state, has_initial_state=known, **kw)
        )
        known = torch.ones(2, dtype=torch.bool)
    for parts, expected in zip(zip(*pieces, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert torch.equal(state, whole_state)


def test_ragged_equals_separate_sequences() -> None:
    x, weight = torch.randn(1, T, D), torch.randn(D, 4)
    ragged = short_conv_qkv(x, weight, cu_seqlens=OFFSETS, **SIZES)
    for n in range(len(LENGTHS)):
        rows = slice(int(OFFSETS[n]), int(OFFSETS[n + 1]))
        for out, part in zip(short_conv_qkv(x[:, rows], weight, **SIZES), ragged, strict=True):
            torch.testing.assert_close(part[:, rows], out)
    assert all((part[:, OFFSETS[-1] :] == 0).all() for part in ragged)


def poisoned_arguments(layout: str) -> dict[str, Any]:
    """NaN wherever nothing may be read: padding, null block, states of sequences without one."""
    inputs = arguments(layout=layout, dtype=torch.float32)
    inputs["x"][:, OFFSETS[-1] :] = float("nan")
    inputs["x"][:, OFFSETS[3] : OFFSETS[4]] = float("nan")
    rows = rows_of(inputs["conv_state"], layout)
    rows[0] = float("nan")
    rows[SLOTS[~INITIAL]] = float("nan")
    return inputs


def check_poisoned(function: Any, layout: str) -> None:
    inputs = poisoned_arguments(layout)
    skipped = torch.zeros(T, dtype=torch.bool)
    skipped[OFFSETS[-1] :] = skipped[OFFSETS[3] : OFFSETS[4]] = True
    for part in function(**inputs):
        assert (part[:, skipped] == 0).all()
        assert part.isfinite().all()
        assert (part[:, ~skipped] != 0).all()
    rows = rows_of(inputs["conv_state"], layout)
    assert rows[0].isnan().all()
    assert rows[SLOTS[SLOTS != 0], :3].isfinite().all()
    assert rows[SLOTS[~INITIAL], 3:].isnan().all()


@layouts
def test_skipped_rows_are_not_read(layout: str) -> None:
    check_poisoned(short_conv_qkv, layout)


@layouts
@pytest.mark.interpreter
def test_skipped_rows_are_not_read_by_the_kernel(layout: str) -> None:
    check_poisoned(run_kernels(short_conv_qkv), layout)


@pytest.mark.interpreter
@pytest.mark.parametrize("bad", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_in_one_head_stays_there(bad: int) -> None:
    """Padded lanes of a head overlap its neighbor's channels."""
    inputs: dict[str, Any] = {"x": torch.randn(1, 9, D), "weight": torch.randn(D, 4)}
    channels = slice(bad * KEY_DIM, bad * KEY_DIM + K)  # head 0
    inputs["x"][..., channels] = float("nan")
    inputs["weight"][channels] = float("nan")
    outputs = list(run_kernels(short_conv_qkv)(**inputs, **SIZES))
    outputs[2] = outputs[2][..., : KEY_DIM // 2 + 3].unflatten(-1, (-1, 3))
    for part, out in enumerate(outputs):
        first = 1 if part < 2 else 2
        assert out[:, :, :first].isnan().all() == (part == bad)
        assert out[:, :, first:].isfinite().all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "offsets", [[5, 3, 1], [0, 900, 2], [-70, 4, 24], [2**31, -(2**40), 7], [0, 200, 400]]
)
def test_kernel_stays_in_bounds_for_all_offsets(offsets: list[int]) -> None:
    pool = torch.zeros(3, T, D)
    pool[1] = torch.randn(T, D)
    state = torch.zeros(9, 3, D)
    run_kernels(short_conv_qkv)(
        x=pool[1:2],
        weight=torch.randn(D, 4),
        **SIZES,
        conv_state=state[3:6],
        state_indices=torch.tensor([1, 2]),
        has_initial_state=torch.ones(2, dtype=torch.bool),
        cu_seqlens=torch.tensor(offsets),
        layout="SD",
    )
    assert (state[:4] == 0).all()
    assert (state[6:] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("slot", [-1, 7, 2**31 - 1])
def test_kernel_skips_slots_out_of_range(slot: int) -> None:
    inputs = poisoned_arguments("SD") | {"state_indices": SLOTS.where(SLOTS != 1, slot)}
    before = inputs["conv_state"][[0, 1, 4]].clone()
    for part in run_kernels(short_conv_qkv)(**inputs):
        assert (part[:, OFFSETS[2] : OFFSETS[3]] == 0).all()
        assert (part[:, OFFSETS[4] : OFFSETS[5]] != 0).all()
    assert torch.equal(inputs["conv_state"][[0, 1, 4]].nan_to_num(), before.nan_to_num())


@pytest.mark.interpreter
@pytest.mark.parametrize("case", cases("short_conv_qkv", kernels=True), ids=lambda case: case.name)
def test_kernel_in_several_steps(case: Case) -> None:
    """As in the large sizes: programs that carry their window from step to step."""
    ((_, values),) = DEFAULTS["short_conv_qkv"]
    with override({"short_conv_qkv": {**values, "PROGRAMS": 1, "MAX_STEPS": 3}}):
        assert_accurate(run_kernels(short_conv_qkv), short_conv_qkv, case)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(T, D)}, r"x must have 3 dimensions, got shape \(24, 33\)"),
        ({"x": torch.zeros(1, T, D).int()}, r"x must have dtype .*, got int32"),
        ({"x": torch.zeros(2, T, D)}, r"x must have batch size 1 with cu_seqlens, got 2"),
        ({"weight": torch.zeros(8, 4)}, r"weight must have shape \[33, 4\], got \(8, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[33\], got \(4,\)"),
        ({"activation": "gelu"}, r"activation must be 'silu', 'swish' or None, got 'gelu'"),
        ({"head_dim": 0}, r"head_dim must be in \[1, 256\], got 0"),
        ({"head_dim": 257}, r"head_dim must be in \[1, 256\], got 257"),
        ({"key_dim": 13}, r"key_dim must be a multiple of head_dim = 6, got 13"),
        ({"key_dim": 0}, r"key_dim must be a multiple of head_dim = 6, got 0"),
        ({"key_dim": 18}, r"D more than 2 \* key_dim = 36, got \(1, 24, 33\)"),
        ({"norm_eps": 0.0}, r"norm_eps must be positive, got 0.0"),
        ({"layout": "LD"}, r"layout must be one of SD, DS, auto, got 'LD'"),
        ({"layout": "DS"}, r"conv_state must have shape \[slots, 33, L\] with L at least 3 in"),
        ({"conv_state": None}, r"state_indices must come with conv_state, got state_indices alone"),
        ({"state_indices": SLOTS + 1}, r"state_indices must be below 7, got 7"),
        (
            {"state_indices": SLOTS.clamp(max=2)},
            r"state_indices must not repeat, got 2 more than once",
        ),
        ({"has_initial_state": SLOTS}, r"has_initial_state must have dtype bool, got int64"),
        ({"cu_seqlens": OFFSETS * 2}, r"cu_seqlens must end at or before 24 tokens, got 40"),
        ({"cu_seqlens": OFFSETS.to("meta")}, r"cu_seqlens must be on cpu like x, got meta"),
    ],
)
def test_errors(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        short_conv_qkv(**arguments() | change)


def step(x: Tensor, weight: Tensor, state: Tensor, state_indices: Tensor, known: Tensor) -> Any:
    kw: dict[str, Any] = {"state_indices": state_indices, "has_initial_state": known, **SIZES}
    return short_conv_qkv(x * 2, weight, conv_state=state, **kw)


@layouts
@shapes
def test_compiled_is_one_launch_and_does_not_copy_the_state(
    layout: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(config, "conv_layout", layout)
    state = paged_conv_state(4, 4, D, layout, torch.float32, CPU).clone()
    known = torch.tensor([True, False])
    inputs = [torch.randn(2, 9, D), torch.randn(D, 4), state, torch.tensor([3, 1]), known]
    eager = [t.clone() for t in inputs]
    expected = step(*eager)
    out, (source,) = run_and_get_code(torch.compile(step, fullgraph=True, dynamic=dynamic), *inputs)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(inputs[2], eager[2])
    assert summary(source).externs == ["torch.ops.kda_ops.native_short_conv_qkv.state"]
    _, (source,) = cuda_code(step, *inputs, dynamic=dynamic)
    found = summary(source)
    assert found.externs == []
    assert len(found.launches) == 2
    assert found.launches[1] == "short_conv_qkv_kernel"
    assert found.allocations == 4  # x * 2, q, k, v


@shapes
def test_compiled_without_a_state_is_one_launch(dynamic: bool) -> None:
    def call(x: Tensor, weight: Tensor) -> Any:
        return short_conv_qkv(x, weight, **SIZES)

    _, (source,) = cuda_code(call, torch.randn(2, 9, D), torch.randn(D, 4), dynamic=dynamic)
    found = summary(source)
    assert (found.launches, found.externs) == (["short_conv_qkv_kernel"], [])
    assert found.allocations == 3
